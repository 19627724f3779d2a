"""The examples: the script runs in an empty folder, and the notebook has its cells and its outputs."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.make_notebook import Cell, cells_of, notebook_of

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "quickstart.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
LARGEST = 150_000  # bytes of the notebook
TINY = """# %% [markdown]
# # Title
#
# Text.

# %%
number = 6

# %%
print(number * 7)
print("done")

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(1, 1))
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the output of the script, run in an empty folder without a network."""
    folder = tmp_path_factory.mktemp("empty")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in folder.iterdir()] == ["quickstart"]
    return done.stdout


@pytest.fixture(scope="module")
def notebook() -> dict[str, Any]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def shown(notebook: dict[str, Any]) -> str:
    """Return all text that a notebook shows as printed."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    return "".join(line for output in outputs for line in output.get("text", ()))


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(pattern, text)]


def facts(text: str) -> None:
    """Check what the script must show, whatever the last digits are on a machine."""
    losses = numbers(r"loss (\d+\.\d+)", text)
    assert len(losses) == 4
    assert losses[-1] < losses[0] / 2
    accuracies = numbers(r"accuracy (?:before training )?(\d+\.\d+)", text)
    assert len(accuracies) == 5
    assert accuracies[-1] > accuracies[0] + 20
    assert "equal parameters: True\nequal logits: True\n" in text
    # per layer: two adapters and gates of the encoder, one parallel adapter, and its two norms (docs/architecture.md)
    pair = 2 * 64 * 16 + 64 + 16
    visual = 512 * 64 + 64 + 5 * 64 + 64 + 2 * 2 * 64 + 2 * 64
    trained = 2 * (2 * 2 * pair + pair + 2 * 2 * 64) + 2 * 64 + visual
    assert numbers(r"([\d,]+) of [\d,]+ parameters are trained", text) == [trained]
    assert "VL-PET on BART-base: 2,363,616 of 141,917,664 parameters" in text
    means = numbers(r"layer \d: \(32, 27, 64\), mean (\d\.\d+)", text)
    assert len(means) == 4
    assert all(0 < mean < 1 for mean in means)
    asked = re.search(r"from the file: (.*) -> (.*)\n", text)  # the answer of so short a training may be empty
    assert asked is not None
    assert f"{asked[1]} -> {asked[2]} (" in text  # the stored features give the same answer


def test_the_script_runs_in_an_empty_folder_and_shows_what_it_says(printed: str) -> None:
    facts(printed)


def test_the_notebook_has_the_cells_of_the_script(notebook: dict[str, Any]) -> None:
    cells = [Cell(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert cells == cells_of(SCRIPT.read_text()), "run: python examples/make_notebook.py"


def test_the_notebook_shows_the_same_facts_and_a_picture(notebook: dict[str, Any]) -> None:
    facts(shown(notebook))
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    pictures = [output["data"]["image/png"] for output in outputs if output["output_type"] == "display_data"]
    assert [base64.b64decode(picture)[:8] for picture in pictures] == [b"\x89PNG\r\n\x1a\n"]
    assert NOTEBOOK.stat().st_size < LARGEST


def test_the_notebook_names_no_machine(notebook: dict[str, Any]) -> None:
    text = json.dumps(notebook)
    assert re.findall(r"/(?:home|root|tmp|work|Users)/|0x[0-9a-f]{6,}|\b20\d\d-\d\d-\d\d", text) == []


def test_the_notebook_fits_the_schema(notebook: dict[str, Any]) -> None:
    pytest.importorskip("nbformat").validate(notebook)


def test_a_script_is_split_into_cells() -> None:
    first, second, *_ = cells_of(TINY)
    assert first == Cell("markdown", "# Title\n\nText.")
    assert second == Cell("code", "number = 6")
    assert [cell.kind for cell in cells_of(TINY)] == ["markdown", "code", "code", "code"]


def test_cells_share_their_names_and_keep_their_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    title, assigned, printed, drawn = notebook_of(TINY)["cells"]
    assert "outputs" not in title
    assert assigned["outputs"] == []
    assert printed["outputs"] == [{"name": "stdout", "output_type": "stream", "text": ["42\n", "done\n"]}]
    assert [output["output_type"] for output in drawn["outputs"]] == ["display_data"]
    assert Path.cwd() == tmp_path
