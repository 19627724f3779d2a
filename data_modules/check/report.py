"""What `data check` has found, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from data_modules.check.lengths import LIMIT, Lengths
from data_modules.check.published import SAMPLES

Level = Literal["failed", "warning", "note"]
STYLES: dict[Level, str] = {"failed": "bold red", "warning": "yellow", "note": "dim"}
NOTHING = "-"
FREQUENT = 0.01  # the least share of an answer that is worth a cell
LITERATURE = "literature: what papers and their authors' files say of the public data; not measured here"


class Finding(NamedTuple):
    """Something that a user should know.

    Args:
        level: ``failed``: a run would stop or be wrong; ``warning``: it may not be what was meant; ``note``: a fact.
        where: Task and split, or the store.
        what: What, how many, the first ids.
    """

    level: Level
    where: str
    what: str


@dataclass
class Part:
    """One split of a task.

    Args:
        task: The task.
        split: The split.
        samples: How many; None if they cannot be read.
        whole: Whether no limit of the config leaves some out.
        images: Different images or clips.
        featureless: Those without features; None if there is no store.
        shared: Those that another split has and should not have.
        answered: Share of samples with an answer of positive score; None where answers are kept or are captions.
        known: Share of the answered whose best answer is one of training.
        frequent: The most frequent best answer, and its share.
    """

    task: str
    split: str
    samples: int | None = None
    whole: bool = True
    images: int = 0
    featureless: int | None = None
    shared: int = 0
    answered: float | None = None
    known: float | None = None
    frequent: tuple[str, float] | None = None


def parts_table(parts: Iterable[Part]) -> Table:
    """What each split of each task holds."""
    table = Table("task", "split", title="data", box=SIMPLE_HEAD, caption=LITERATURE, caption_justify="left")
    for name in ("samples", "literature", "images", "no\nfeatures", "shared", "answered", "known\nanswers"):
        table.add_column(name, justify="right")
    table.add_column("most\nfrequent", overflow="fold")
    for part in parts:
        published = SAMPLES.get((part.task, part.split)) if part.whole else None
        literature = Text(NOTHING if published is None else f"{published:,}", style="dim")
        if part.samples is None:
            table.add_row(part.task, part.split, Text("unreadable", style="bold red"), literature)
            continue
        missing = Text("no store", style="bold red") if part.featureless is None else _count(part.featureless)
        cells: list[str | Text] = [f"{part.samples:,}", literature, f"{part.images:,}", missing, _count(part.shared)]
        frequent = NOTHING
        if part.frequent is not None and part.frequent[1] >= FREQUENT:
            frequent = f"{part.frequent[0]} {_percent(part.frequent[1])}"
        table.add_row(part.task, part.split, *cells, _percent(part.answered), _percent(part.known), frequent)
    return table


def lengths_table(lengths: Sequence[Lengths]) -> Table:
    """How long inputs and targets are, and how many are cut."""
    caption = f"columns right of {LIMIT} are cut; the last of them holds everything longer"
    table = Table(
        "task", "split", "text", title="lengths in tokens, before cutting", box=SIMPLE_HEAD, caption_justify="left"
    )
    table.caption = caption if any(one.cut for one in lengths) else None
    for name in ("limit", "min", "median", "p95", "max", "cut"):
        table.add_column(name, justify="right")
    table.add_column("histogram", no_wrap=True)
    for one in lengths:
        share = f"{one.cut:,} ({_percent(one.cut / len(one.tokens))})" if one.cut else "0"
        # inverted: of a length that is there, such as 7.5 of 7 and 8
        ranks = np.percentile(one.tokens, [0, 50, 95, 100], method="inverted_cdf").astype(int)
        kept, lost = one.bars
        bars = Text(kept) + (Text(LIMIT + lost, style="red") if lost else Text(""))
        limit = NOTHING if one.limit is None else str(one.limit)
        table.add_row(one.task, one.split, one.part, limit, *map(str, ranks), share, bars)
    return table


def findings_table(findings: Iterable[Finding]) -> Table:
    """What was found, failures first."""
    table = Table("", "where", title="findings", box=SIMPLE_HEAD)
    table.add_column("what", overflow="fold")
    for level, style in STYLES.items():
        for finding in (one for one in findings if one.level == level):
            table.add_row(Text(level, style=style), finding.where, Text(finding.what))
    return table


def _count(number: int) -> Text:
    return Text(f"{number:,}", style="bold red" if number else "")


def _percent(share: float | None) -> str:
    """A share in percent; what is not all or nothing does not look so.

    >>> _percent(0.99999), _percent(1.0), _percent(0.00001), _percent(None)
    ('> 99.9 %', '100 %', '< 0.1 %', '-')
    """
    if share is None:
        return NOTHING
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    return "< 0.1 %" if share < 0.001 else "> 99.9 %" if share > 0.999 else f"{100 * share:.1f} %"
