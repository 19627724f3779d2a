"""Groups of runs compared: what stands in the rows of a report, independent of its format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_lowercase
from typing import Literal, NamedTuple

from vlpet_lightning.protocol import scale_of
from vlpet_lightning.published import objections
from vlpet_lightning.published.rows import Row
from vlpet_lightning.reports.bootstrap import Bootstrap, Interval
from vlpet_lightning.reports.comparability import reasons_against, usual_facts, warnings_of
from vlpet_lightning.reports.groups import Group, Value, best
from vlpet_lightning.reports.questions import Questions, read_questions
from vlpet_lightning.reports.runs import STAGE
from vlpet_lightning.tasks import TASKS

TITLES = {
    "vqa": "VQAv2",
    "gqa": "GQA",
    "nlvr2": "NLVR2",
    "caption": "COCO caption",
    "tvqa": "TVQA",
    "how2qa": "How2QA",
    "tvc": "TVC",
    "yc2c": "YC2C",
}
AVERAGE = "average"
PUBLISHED, DIFFERENCE = "published", "measured - published"
ROW_ABOVE = "not comparable with the row above"
OTHER_ROWS = "not comparable with the other rows"
Kind = Literal["measured", "published", "difference"]


class Line(NamedTuple):
    """A line of the table.

    Args:
        kind: What its numbers are.
        label: Method, or source.
        backbone: Name of the backbone.
        percent: Trained parameters in percent of all.
        values: Score of each task, then the average; None if unknown.
        seeds: Number of runs; None if unknown.
        notes: Marks of its footnotes.
        bold: Columns of ``values`` in which it is the best of the comparable measured lines.
    """

    kind: Kind
    label: str
    backbone: str
    percent: float | None
    values: tuple[Value | None, ...]
    seeds: int | None
    notes: tuple[str, ...] = ()
    bold: frozenset[int] = frozenset()


@dataclass
class Comparison:
    """Groups of runs with all that a report says about them.

    Args:
        groups: The groups, in the order of the report.
        untested: Folders of runs without test scores.
        baseline: Label of the group that the others are compared with; by default the fully trained one, else the
            best.
    """

    groups: Sequence[Group]
    untested: Sequence[Path] = ()
    baseline: str | None = None
    intervals: dict[str, dict[str, Interval]] = field(default_factory=dict)  # by group and task, against the baseline
    left_out: dict[str, str] = field(default_factory=dict)  # reason by task without intervals

    def __post_init__(self) -> None:
        usual = usual_facts(self.groups)
        self.against = {group.label: reasons_against(group, usual) for group in self.groups}
        self.warnings = warnings_of(self.groups, self.untested)
        self.tasks = [task for task in TASKS if any(task in group.tasks for group in self.groups)]
        labels = [group.label for group in self.groups]
        if self.baseline is not None and self.baseline not in labels:
            raise ValueError(f"there is no row {self.baseline!r} to compare with: choose one of {', '.join(labels)}")
        self.reference = self._reference()

    @property
    def comparable(self) -> list[Group]:
        """Groups with the protocol, splits and data of most runs."""
        return [group for group in self.groups if not self.against[group.label]]

    def _reference(self) -> Group:
        if self.baseline is not None:
            return next(group for group in self.groups if group.label == self.baseline)
        full = next((group for group in self.comparable if group.percent == 100), None)
        return full or best(self.comparable) or self.groups[0]

    @property
    def headings(self) -> list[str]:
        """Headings of the scores."""
        return [*(title(task) for task in self.tasks), AVERAGE]

    @property
    def units(self) -> str:
        """What the scores are, in a sentence: metric and scale of each task."""
        found: dict[str, list[str]] = {}
        for task in self.tasks:
            found.setdefault(unit(task), []).append(title(task))
        parts = [f"{what} ({', '.join(tasks)})" for what, tasks in found.items()]
        return f"Scores: {'; '.join(parts)}."

    def values(self, group: Group) -> tuple[Value | None, ...]:
        """Return a group's score of each task, and its average if it has all of the tasks."""
        scores = [group.score(task) if task in group.tasks else None for task in self.tasks]
        return (*scores, group.average() if set(group.tasks) == set(self.tasks) else None)

    def lines(self) -> tuple[list[Line], list[str]]:
        """Return the lines of the table, and their footnotes."""
        notes = _Notes()
        each = [_objections(group) for group in self.groups if group.same_method]
        shared = [reason for reason in each[0] if all(reason in reasons for reasons in each)] if len(each) > 1 else []
        found = [line for group in self.groups for line in self._lines_of(group, notes, shared)]
        return found, notes.texts

    def _lines_of(self, group: Group, notes: _Notes, shared: Sequence[str]) -> Iterator[Line]:
        values = self.values(group)
        marks = tuple(notes.mark(f"{OTHER_ROWS}: {reason}") for reason in self.against[group.label])
        bold = frozenset() if marks else frozenset(n for n, value in enumerate(values) if self._is_best(n, value))
        yield Line("measured", group.label, group.backbone, group.percent, values, len(group.runs), marks, bold)
        for row in group.same_method:
            reasons = _objections(group)
            cited = [notes.mark(f"{row.source}; not measured here")]
            own = [reason for reason in reasons if reason not in shared]
            cited += [notes.mark(f"{ROW_ABOVE}: {'; '.join(part)}") for part in (shared, own) if part and reasons]
            theirs = _published(row, self.tasks)
            label = PUBLISHED if row.method == group.label else f"{PUBLISHED}: {row.method}"
            marks = tuple(sorted(cited, key=lambda mark: (len(mark), mark)))
            yield Line("published", label, row.backbone, row.trained, theirs, row.seeds, marks)
            if not reasons:
                yield Line("difference", DIFFERENCE, "", None, _minus(values, theirs), None)

    def _is_best(self, column: int, value: Value | None) -> bool:
        rivals = [self.values(group)[column] for group in self.comparable]
        return value is not None and len(rivals) > 1 and value.mean == max(rival.mean for rival in rivals if rival)

    def bootstrap(self, resamples: int, seed: int, advance: Callable[[], None] = lambda: None) -> None:
        """Compute the intervals of the differences to the baseline.

        Args:
            resamples: Number of resamples.
            seed: Seed of the draws.
            advance: Called after each prediction file, for a progress bar.
        """
        runs = [run for group in self.groups for run in group.runs]
        tasks: dict[str, Questions] = {}
        for task in self.tasks:
            if any(task not in run.mains for run in runs):
                self.left_out[task] = "a run has no score of it"
                continue
            found, reason = read_questions(runs, task, advance)
            if found is None:
                self.left_out[task] = reason
            else:
                tasks[task] = found
        drawn = Bootstrap(tasks, resamples, seed)
        places: dict[str, list[int]] = {}
        for number, label in enumerate([group.label for group in self.groups for _ in group.runs]):
            places.setdefault(label, []).append(number)
        wanted = {task: [task] for task in tasks} | ({AVERAGE: list(tasks)} if tasks and not self.left_out else {})
        for group in self.groups:
            if group is not self.reference and tasks:
                other = places[self.reference.label]
                self.intervals[group.label] = {
                    name: drawn.compare(places[group.label], other, some) for name, some in wanted.items()
                }


class _Notes:
    """Footnotes, each with a letter; equal notes share one."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return mark_of(self.texts.index(text))


def mark_of(number: int) -> str:
    """Return the mark of a footnote: a, b, ..., z, aa, ab.

    >>> mark_of(0), mark_of(25), mark_of(26)
    ('a', 'z', 'aa')
    """
    letter = ascii_lowercase[number % 26]
    return letter if number < 26 else mark_of(number // 26 - 1) + letter


def title(task: str) -> str:
    """Return a task's name in tables and figures."""
    return TITLES.get(task, task)


def unit(task: str) -> str:
    """Return a task's main metric with its scale.

    >>> unit("vqa"), unit("gqa"), unit("caption")
    ('accuracy_original in percent', 'accuracy in percent', 'CIDEr x 100')
    """
    metric, scale = TASKS[task].score, scale_of(TASKS[task].score)
    return f"CIDEr {scale}" if metric == "cider" else f"{metric} in {scale}"


def _objections(group: Group) -> list[str]:
    """Return what stands against comparing a group with the published row of its method."""
    if group.published:
        return objections(group.record, STAGE)
    sizes = (group.record.get("backbone") or {}).get("sizes") or {}
    width = sizes.get("d_model")
    return [f"other settings than the published ones (backbone {group.backbone or 'unknown'}, width {width})"]


def _published(row: Row, tasks: Sequence[str]) -> tuple[Value | None, ...]:
    scores = [Value(*row.scores[task]) if task in row.scores else None for task in tasks]
    return (*scores, Value(*row.average) if set(row.scores or tasks) == set(tasks) else None)


def _minus(ours: Sequence[Value | None], theirs: Sequence[Value | None]) -> tuple[Value | None, ...]:
    pairs = zip(ours, theirs, strict=True)
    return tuple(None if one is None or other is None else Value(one.mean - other.mean, None) for one, other in pairs)
