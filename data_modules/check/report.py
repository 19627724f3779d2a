"""Tables of the results of `data check`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from data_modules.annotations.published import SAMPLES
from data_modules.check.lengths import LIMIT, Lengths

Level = Literal["failed", "warning", "note"]
STYLES: dict[Level, str] = {"failed": "bold red", "warning": "yellow", "note": "dim"}
NOTHING = "-"
FREQUENT = 0.01  # minimum share of an answer to be shown
LITERATURE = "literature: what papers and their authors' files say of the public data; not measured here"


class Finding(NamedTuple):
    """A result of a check that is reported to the user.

    Args:
        level: ``failed``: a run would stop or be wrong; ``warning``: probably a mistake; ``note``: information only.
        where: Task and split, or the store.
        what: Description, with counts and the first ids.
    """

    level: Level
    where: str
    what: str


@dataclass
class Part:
    """Statistics of one split of a task.

    Args:
        task: The task.
        split: The split.
        samples: Number of samples; None if they cannot be read.
        whole: Whether the split is complete, not limited by the config.
        images: Number of distinct images or clips.
        featureless: Number of images without features; None if there is no store.
        shared: Number of images that are also in a split that must not contain them.
        answered: Share of samples with an answer of positive score; None if answers are not public or are captions.
        known: Share of the answered samples whose best answer occurs in training.
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
    """Table of the statistics of each split."""
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
    """Table of the lengths of inputs and targets, and of the number truncated."""
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
        # inverted_cdf returns lengths that occur, not 7.5 for 7 and 8
        ranks = np.percentile(one.tokens, [0, 50, 95, 100], method="inverted_cdf").astype(int)
        kept, lost = one.bars
        bars = Text(kept) + (Text(LIMIT + lost, style="red") if lost else Text(""))
        limit = NOTHING if one.limit is None else str(one.limit)
        table.add_row(one.task, one.split, one.part, limit, *map(str, ranks), share, bars)
    return table


def findings_table(findings: Iterable[Finding]) -> Table:
    """Table of the findings, failures first."""
    table = Table("", "where", title="findings", box=SIMPLE_HEAD)
    table.add_column("what", overflow="fold")
    for level, style in STYLES.items():
        for finding in (one for one in findings if one.level == level):
            table.add_row(Text(level, style=style), finding.where, Text(finding.what))
    return table


def _count(number: int) -> Text:
    return Text(f"{number:,}", style="bold red" if number else "")


def _percent(share: float | None) -> str:
    """Format a share in percent, so that only 0 and 1 are shown as 0 % and 100 %.

    >>> _percent(0.99999), _percent(1.0), _percent(0.00001), _percent(None)
    ('> 99.9 %', '100 %', '< 0.1 %', '-')
    """
    if share is None:
        return NOTHING
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    return "< 0.1 %" if share < 0.001 else "> 99.9 %" if share > 0.999 else f"{100 * share:.1f} %"
