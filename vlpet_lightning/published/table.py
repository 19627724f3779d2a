"""Scores of a run as a table, with the published rows of its method beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlpet_lightning.protocol import scale_of, split_of, title_of
from vlpet_lightning.published import objections, rows_of
from vlpet_lightning.published.rows import Row, Score
from vlpet_lightning.tasks import TASKS

Scores = Mapping[str, Mapping[str, float]]  # by task and metric


def in_words(score: Score | None) -> str:
    """Format a published score: ``66.17 (0.27)``.

    >>> in_words((66.17, 0.27)), in_words((76.3, None)), in_words(None)
    ('66.17 (0.27)', '76.3', '')
    """
    if score is None:
        return ""
    mean, deviation = score
    return f"{mean:g}" if deviation is None else f"{mean:.2f} ({deviation:.2f})"


def main_scores(scores: Scores) -> dict[str, float]:
    """Return the main score of each task, in the order of the benchmark."""
    return {
        name: scores[name][spec.score] for name, spec in TASKS.items() if name in scores and spec.score in scores[name]
    }


def marks(row: Row) -> str:
    """Describe what a published row is: method, backbone, source and seeds."""
    seeds = "" if row.seeds is None else f", mean (deviation) of {row.seeds} seeds"
    return f"{row.method} on {row.backbone}: {row.source}, protocol original{seeds}"


def notes(record: Mapping[str, Any], stage: str) -> list[str]:
    """Return a sentence for each published row of a run's method, and one for what stands against comparing them."""
    rows = rows_of(record)
    if not rows:
        return ["no published row has this method and backbone"]
    against = objections(record, stage)
    same = "same protocol, recipe, sample counts and extractor; checksums of the published data are not known"
    verdict = f"not comparable: {'; '.join(against)}" if against else f"comparable: {same}"
    return [*(f"published, {marks(row)}" for row in rows), verdict]


def score_table(record: Mapping[str, Any], scores: Scores, stage: str) -> Table:
    """Return a table with a row per task: split, metric, score, scale, and published scores marked as such.

    Args:
        record: Protocol record of the run.
        scores: Scores by task and metric.
        stage: ``val`` or ``test``.
    """
    rows, mains = rows_of(record), main_scores(scores)
    comparable = bool(rows) and not objections(record, stage)
    table = Table(title=f"{stage} scores, protocol {title_of(record)}, seed {record.get('seed')}")
    for name in ("task", "split", "metric"):
        table.add_column(name, overflow="fold")
    table.add_column("score", justify="right", style="bold")
    table.add_column("scale")
    for row in rows:
        heading = f"published: {row.method}" if comparable else f"published: {row.method} (not comparable)"
        table.add_column(Text(heading), justify="right", style="" if comparable else "dim", overflow="fold")
    for task, score in mains.items():
        metric = TASKS[task].score
        published = [in_words(row.scores.get(task)) for row in rows]
        table.add_row(task, split_of(record, stage, task), metric, f"{score:.2f}", scale_of(metric), *published)
    if len(mains) > 1:
        table.add_section()
        whole = [in_words(row.average) if set(row.scores or mains) == set(mains) else "" for row in rows]
        table.add_row("average", "", "", f"{sum(mains.values()) / len(mains):.2f}", "", *whole)
    return table


def print_scores(console: Console, record: Mapping[str, Any], scores: Scores, stage: str) -> None:
    """Print the table of :func:`score_table`, and below it what the published rows are and whether they compare."""
    console.print(score_table(record, scores, stage))
    for line in notes(record, stage):
        console.print(Text(line, style="dim"), soft_wrap=True)
