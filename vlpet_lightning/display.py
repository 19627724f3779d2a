"""Reports as text in a terminal and as HTML in a notebook, and figures with units."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from io import StringIO

from rich.console import Console
from rich.table import Table

WIDTH = 100  # characters; text output does not depend on the terminal


class Displayed:
    """Base class of reports that consist of tables: a readable ``repr``, and HTML in notebooks."""

    def tables(self) -> list[Table]:
        """Return the report as tables for the terminal."""
        raise NotImplementedError(f"{type(self).__name__} must define tables()")

    def __repr__(self) -> str:
        return as_text(self.tables())

    def _repr_html_(self) -> str:
        return as_html(self.tables())


def as_text(tables: Sequence[Table], width: int = WIDTH) -> str:
    """Render tables as plain text.

    >>> table = Table("group", "trainable", title="counts")
    >>> table.add_row("encoder PET", "1,024")
    >>> print(as_text([table]))
             counts
    ┏━━━━━━━━━━━━━┳━━━━━━━━━━━┓
    ┃ group       ┃ trainable ┃
    ┡━━━━━━━━━━━━━╇━━━━━━━━━━━┩
    │ encoder PET │ 1,024     │
    └─────────────┴───────────┘
    """
    console = Console(file=StringIO(), width=width, force_terminal=False, force_jupyter=False, highlight=False)
    with console.capture() as captured:
        console.print(*tables, sep="\n")
    return "\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n"))


def as_html(tables: Sequence[Table]) -> str:
    """Render tables as HTML, with numbers aligned to the right.

    >>> table = Table("group", title="counts", caption="of <all>")
    >>> table.add_row("biases")
    >>> print(as_html([table]))
    <table><caption>counts</caption>
    <tr><th style="text-align: left">group</th></tr>
    <tr><td style="text-align: left">biases</td></tr>
    </table>
    <p>of &lt;all&gt;</p>
    """
    return "\n".join(map(_html, tables))


def gigaflops(value: float) -> str:
    """Format FLOPs."""
    return f"{value / 1e9:.2f} GFLOP"


def as_bytes(value: float) -> str:
    """Format bytes.

    >>> as_bytes(3 * 2**20), as_bytes(900)
    ('3.0 MiB', '900 B')
    """
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}" if unit == "GiB" else f"{value / scale:.1f} {unit}"
    return f"{value:.0f} B"


def _html(table: Table) -> str:
    def row(kind: str, cells: Sequence[str]) -> str:
        styled = (
            f'<{kind} style="text-align: {column.justify}">{escape(cell)}</{kind}>'
            for column, cell in zip(table.columns, cells, strict=True)
        )
        return f"<tr>{''.join(styled)}</tr>"

    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    return "\n".join(
        [
            f"<table><caption>{escape(str(table.title))}</caption>",
            row("th", [str(column.header) for column in table.columns]),
            *(row("td", cells) for cells in zip(*columns, strict=True)),
            "</table>",
            *([f"<p>{escape(str(table.caption))}</p>"] if table.caption else []),
        ]
    )
