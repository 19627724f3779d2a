"""Run a script in percent format and write it as a notebook with its outputs: ``python examples/make_notebook.py``.

Cells are run in one process, as by a kernel; printed text and open figures become outputs.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, NamedTuple

SCRIPT = Path(__file__).with_name("quickstart.py")
MARK = re.compile(r"^# %%(?P<kind> \[markdown\])?\n", re.MULTILINE)
IMAGE_METADATA = {"Software": None}  # no version in the file


class Cell(NamedTuple):
    """A cell of a notebook."""

    kind: str  # markdown or code
    source: str


def cells_of(script: str) -> list[Cell]:
    """Split a script into cells; a markdown cell is a comment."""
    marks = list(MARK.finditer(script))
    ends = [mark.start() for mark in marks[1:]] + [len(script)]
    cells = []
    for mark, end in zip(marks, ends, strict=True):
        source = script[mark.end() : end].strip("\n")
        if mark["kind"]:
            source = "\n".join(line.removeprefix("#").removeprefix(" ") for line in source.split("\n"))
        cells.append(Cell("markdown" if mark["kind"] else "code", source))
    return cells


def outputs_of(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a code cell and return its outputs.

    Args:
        source: Its code.
        names: Names that earlier cells have defined; updated.
    """
    printed = StringIO()
    with redirect_stdout(printed):
        exec(compile(source, "<cell>", "exec"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": _lines(printed.getvalue())})
    return outputs + [_figure(figure) for figure in _open_figures()]


def _open_figures() -> list[Any]:
    if "matplotlib.pyplot" not in sys.modules:
        return []
    from matplotlib import pyplot

    figures = [pyplot.figure(number) for number in pyplot.get_fignums()]
    pyplot.close("all")
    return figures


def _figure(figure: Any) -> dict[str, Any]:
    file = BytesIO()
    figure.savefig(file, format="png", metadata=IMAGE_METADATA)
    data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": [f"<{figure}>"]}
    return {"data": data, "metadata": {}, "output_type": "display_data"}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


@contextmanager
def empty_folder() -> Iterator[None]:
    """Work in an empty folder for a while."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def notebook_of(script: str) -> dict[str, Any]:
    """Run a script in an empty folder and return it as a notebook (nbformat 4.5)."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells: list[dict[str, Any]] = []
    with empty_folder():
        for number, cell in enumerate(cells_of(script)):
            entry = {"cell_type": cell.kind, "id": f"cell-{number}", "metadata": {}, "source": _lines(cell.source)}
            if cell.kind == "code":
                count = 1 + sum(other["cell_type"] == "code" for other in cells)
                entry |= {"execution_count": count, "outputs": outputs_of(cell.source, names)}
            cells.append(entry)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def main(script: Path = SCRIPT) -> None:
    """Write the notebook of a script beside it."""
    os.environ["MPLBACKEND"] = "agg"
    os.environ["HF_HUB_OFFLINE"] = "1"
    text = json.dumps(notebook_of(script.read_text(encoding="utf-8")), indent=1, sort_keys=True, ensure_ascii=False)
    script.with_suffix(".ipynb").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
