"""One HTML file of text, figures and tables; it loads nothing and runs nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Protocol

Cell = str | float | int | None
FORMATS = {float: ".4f", int: ",d"}
TYPES = {".png": "image/png", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Picture:
    """A figure.

    Args:
        path: PNG or SVG file.
        caption: Text below it, which also describes it to readers who cannot see it.
    """

    path: Path
    caption: str

    def html(self) -> str:
        """Return the figure with its image inline."""
        data = base64.b64encode(self.path.read_bytes()).decode()
        text = escape(self.caption)
        return (
            f'<figure tabindex="0"><img src="data:{TYPES[self.path.suffix]};base64,{data}" alt="{text}">'
            f"<figcaption>{text}</figcaption></figure>"
        )


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        caption: Line above it.
        head: Names of the columns.
        rows: Cells; numbers are formatted, None is an empty cell.
        folded: Whether it is shown on request only.
        whole: Whether all of its rows are visible; otherwise a long table scrolls.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    folded: bool = False
    whole: bool = False

    def html(self) -> str:
        """Return the table, scrollable."""
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in self.head)
        rows = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in self.rows)
        caption = escape(self.caption)
        table = (
            f'<div class="scroll{" whole" * self.whole}" tabindex="0" role="region" aria-label="{caption}">'
            f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        )
        if self.folded:
            return f"<details><summary>{caption}</summary>{table}</details>"
        return f"<p>{caption}</p>{table}"


@dataclass(frozen=True)
class Text:
    """A paragraph; a note stands out."""

    text: str
    note: bool = False

    def html(self) -> str:
        """Return the paragraph."""
        start = '<p class="note">' if self.note else "<p>"
        return f"{start}{escape(self.text)}</p>"


class Block(Protocol):
    """A part of a page."""

    def html(self) -> str:
        """Return the part as HTML."""
        ...


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Args:
        title: Its heading.
        blocks: Its content.
    """

    title: str
    blocks: Sequence[Block]


def _cell(value: Cell) -> str:
    if value is None:
        return "<td></td>"
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    return f'<td class="number">{format(value, FORMATS[type(value)])}</td>'


def page(title: str, introduction: Sequence[Block], sections: Sequence[Section]) -> str:
    """Return the page.

    Args:
        title: Its title.
        introduction: Blocks above the first section.
        sections: Sections, linked at the top.
    """
    style = (files("vlpet_lightning.pages") / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    links = "".join(f'<a href="#s{n}">{escape(section.title)}</a>' for n, section in enumerate(sections))
    body = "".join(
        f'<section aria-labelledby="s{n}"><h2 id="s{n}">{escape(section.title)}</h2>'
        + "".join(block.html() for block in section.blocks)
        + "</section>"
        for n, section in enumerate(sections)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        f'<body><header><h1>{escape(title)}</h1><nav aria-label="Sections">{links}</nav>'
        + "".join(block.html() for block in introduction)
        + f"</header><main>{body}</main></body></html>\n"
    )
