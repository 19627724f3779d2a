"""Protocols of finished runs side by side: what each run's scores depend on, and where the runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from vlpet_lightning.protocol import UNKNOWN, differences, summary
from vlpet_lightning.published import objections, rows_of
from vlpet_lightning.published.rows import Row
from vlpet_lightning.published.table import in_words, notes
from vlpet_lightning.tasks import TASKS

Record = Mapping[str, Any]
Records = Mapping[str, Record | None]  # by run; None for a run that was tested without a record
STAGE = "test"
SAME = "The runs have the same protocol record in every item."


def _facts(records: Records) -> dict[str, dict[str, str]]:
    """Return the main facts of all records, by fact and run."""
    each = {
        run: dict(summary(record)) if record is not None else {"protocol": UNKNOWN} for run, record in records.items()
    }
    names = dict.fromkeys(name for facts in each.values() for name in facts)
    return {name: {run: facts.get(name, "") for run, facts in each.items()} for name in names}


def _differing(records: Records) -> dict[str, dict[str, str]]:
    return differences(records) if len(records) > 1 else {}


def _heading(count: int) -> str:
    return f"These runs differ in {count} item{'s' if count > 1 else ''} of their protocol"


def as_tables(records: Records) -> list[Table | Text]:
    """Return the protocols and their differences for the terminal."""
    found: list[Table | Text] = [_table("protocol of each run", _facts(records), records)]
    if len(records) > 1:
        differing = _differing(records)
        found.append(_table(_heading(len(differing)), differing, records, "yellow") if differing else Text(SAME))
    for run, record in records.items():
        found += [Text(f"{run}: {line}", style="dim") for line in notes(record, STAGE)] if record is not None else []
    return found


def _table(title: str, rows: Mapping[str, Mapping[str, str]], runs: Sequence[str] | Records, style: str = "") -> Table:
    table = Table(title=title, title_style=style)
    table.add_column("item", overflow="fold")
    for run in runs:
        table.add_column(Text(run), overflow="fold")
    for name, values in rows.items():
        table.add_row(name, *(Text(values.get(run, "")) for run in runs))
    return table


def as_markdown(records: Records) -> str:
    """Return the protocols, their differences and the published rows as sections of a report."""
    lines = ["", "## Protocol of each run", "", *_lines(_facts(records), list(records))]
    if len(records) > 1:
        differing = _differing(records)
        lines += ["", f"## {_heading(len(differing))}" if differing else "## Differences of the protocols", ""]
        lines += _lines(differing, list(records)) if differing else [SAME]
    lines += ["", "## Published results of the same method and backbone", ""]
    for run, record in records.items():
        lines += _published(run, record)
    return "\n".join(lines) + "\n"


def _lines(rows: Mapping[str, Mapping[str, str]], runs: Sequence[str]) -> list[str]:
    head = ["| item | " + " | ".join(runs) + " |", "|---|" + "---|" * len(runs)]
    return head + [
        f"| {name} | " + " | ".join(_cell(values.get(run, "")) for run in runs) + " |" for name, values in rows.items()
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _published(run: str, record: Record | None) -> list[str]:
    """Return the published rows of a run's method in a table of their own, after what stands against comparing."""
    if record is None:
        return [f"{run}: the run has no protocol record, so that no published row can be found.", ""]
    rows = rows_of(record)
    said = [f"{run}: {'; '.join(notes(record, STAGE)[-1:])}.", ""]
    if not rows:
        return said
    tasks = [name for name in TASKS if any(name in row.scores for row in rows)]
    head = ["| published | " + " | ".join([*tasks, "average"]) + " |", "|---|" + "---:|" * (len(tasks) + 1)]
    return [*said, *head, *(_row(row, tasks) for row in rows), ""]


def _row(row: Row, tasks: Sequence[str]) -> str:
    scores = [in_words(row.scores.get(task)) for task in tasks]
    seeds = "" if row.seeds is None else f", {row.seeds} seeds"
    return (
        f"| {row.method}, {row.backbone} ({row.source}{seeds}) | " + " | ".join([*scores, in_words(row.average)]) + " |"
    )


def as_json(records: Records) -> dict[str, Any]:
    """Return the protocols, their differences and the published rows as plain data."""
    published = {
        run: {"rows": [asdict(row) for row in rows_of(record)], "not_comparable": objections(record, STAGE)}
        for run, record in records.items()
        if record is not None
    }
    return {"protocols": dict(records), "differences": _differing(records), "published": published}
