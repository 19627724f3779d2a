"""All metrics of the groups, for reports of a few groups."""

from __future__ import annotations

from collections.abc import Sequence

from vlpet_lightning.protocol import scale_of, split_of
from vlpet_lightning.reports.groups import Group
from vlpet_lightning.reports.runs import STAGE
from vlpet_lightning.tasks import TASKS

HEAD = ("task", "split", "metric", "scale")
AVERAGE = "average"


def metric_rows(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of task, split, metric, scale and each group's value.

    A task's main score comes first, the average last. A split that differs between groups is ``test*``.
    """
    rows = []
    for task, spec in TASKS.items():
        known = {metric for group in groups for run in group.runs for metric in run.scores.get(task, {})}
        for metric in sorted(known, key=lambda name: (name != spec.score, name)):
            values = [group.score(task, metric) for group in groups]
            split = split_of_groups(groups, task)
            rows.append([task, split, metric, scale_of(metric), *("" if v is None else str(v) for v in values)])
    averages = [group.average() for group in groups]
    rows.append([AVERAGE, "", "", "", *("" if value is None else str(value) for value in averages)])
    return [*HEAD, *(group.label for group in groups)], rows


def split_of_groups(groups: Sequence[Group], task: str) -> str:
    """Return the split of a task's scores with its scored part; ``test*`` if the groups differ."""
    found = {split_of(group.record or None, STAGE, task) for group in groups}
    return found.pop() if len(found) == 1 else f"{STAGE}*"
