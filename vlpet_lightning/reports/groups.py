"""Runs of one configuration with different seeds, as one row of a table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from vlpet_lightning.overlays import KEY as OVERLAYS
from vlpet_lightning.protocol import SHUFFLED, flattened, short
from vlpet_lightning.published import rows_of
from vlpet_lightning.published.rows import ROWS, Row
from vlpet_lightning.reports.runs import ReportError, Run, run_names
from vlpet_lightning.tasks import TASKS

# settings of the model that do not change its method
SPEED = {"backbone", "compile_model", "cuda_graphs", "generation_graphs"}
SEED = "seed_everything"
SEEDS = {"data_seed"}  # of the training's record: the order of samples, by default from the same seed


@dataclass(frozen=True)
class Value:
    """A score over seeds.

    Args:
        mean: Mean over the runs.
        std: Sample standard deviation (n - 1) over the runs; None for a single run.
    """

    mean: float
    std: float | None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.std is None else f"{self.mean:.2f} ({self.std:.2f})"


def value_of(scores: Sequence[float]) -> Value:
    """Return mean and sample standard deviation.

    >>> str(value_of([66.0, 67.0, 68.0])), str(value_of([66.0]))
    ('67.00 (1.00)', '66.00')
    """
    return Value(fmean(scores), stdev(scores) if len(scores) > 1 else None)


@dataclass(frozen=True)
class Group:
    """Runs of one configuration.

    Args:
        label: Name in tables and figures.
        runs: The runs, by seed.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def record(self) -> Mapping[str, Any]:
        """Protocol record of the first run."""
        return self.runs[0].record

    @property
    def seeds(self) -> list[int]:
        """The distinct seeds."""
        return sorted({run.seed for run in self.runs if run.seed is not None})

    @property
    def backbone(self) -> str:
        """Name of the backbone; of one in a folder, its kind and the folder's name."""
        record = self.record.get("backbone") or {}
        name = record.get("name") or self._model.get("backbone", "")
        local = name.startswith((".", "/")) or name.count("/") > 1
        return f"{record.get('kind', '').upper()} in {Path(name).name}/".strip() if local else name

    @property
    def _model(self) -> Mapping[str, Any]:
        return (self.runs[0].config.get("model") or {}).get("init_args") or {}

    @property
    def percent(self) -> float | None:
        """Trained parameters in percent of all; None if the runs have no record."""
        found = (self.record.get("parameters") or {}).get("percent")
        return None if found is None else float(found)

    @property
    def trainable(self) -> int | None:
        """Number of trained parameters; None if the runs have no record."""
        return (self.record.get("parameters") or {}).get("trainable")

    @property
    def tasks(self) -> list[str]:
        """Tasks for which some run has a score, in the order of the benchmark."""
        return [name for name in TASKS if any(name in run.scores for run in self.runs)]

    def score(self, task: str, metric: str | None = None) -> Value | None:
        """Return a score over the runs; None if a run does not have it.

        Args:
            task: The task.
            metric: Its metric; by default the main one.
        """
        name = TASKS[task].score if metric is None else metric
        found = [run.scores.get(task, {}).get(name) for run in self.runs]
        known = [score for score in found if score is not None]
        return value_of(known) if len(known) == len(found) else None

    def average(self) -> Value | None:
        """Return the mean over the tasks' main scores, over the runs; None if a run lacks one of its tasks' scores."""
        if any(set(run.mains) != set(run.scores) & set(TASKS) or not run.mains for run in self.runs):
            return None
        return value_of([fmean(run.mains.values()) for run in self.runs])

    @property
    def published(self) -> list[Row]:
        """Published rows of the method and backbone."""
        return rows_of(self.record)

    @property
    def same_method(self) -> list[Row]:
        """Published rows of the method by the name of its overlay; its settings may be others than in the source."""
        kind = (self.record.get("backbone") or {}).get("kind")
        stems = {Path(name).stem for name in _overlays(self.runs[0].point)}
        keys = {f"{stem}/{kind}" for stem in stems}
        return self.published or [row for row in ROWS if row.key in keys]


def identity(run: Run) -> str:
    """Return what makes runs comparable as seeds of one configuration: all settings but the seed."""
    record = run.record
    if not record and not run.config:
        return str(run.folder)
    model = dict(run.config.get("model") or {})
    model["init_args"] = {name: value for name, value in (model.get("init_args") or {}).items() if name not in SPEED}
    backbone, trained = record.get("backbone") or {}, record.get("trained") or {}
    facts: dict[str, Any] = {
        "model": model,
        "backbone": {**backbone, "name": Path(backbone.get("name", "")).name, "checksums": None},
        "tests": {task: found.get("part") for task, found in record.get("splits", {}).get("test", {}).items()},
        "training": {name: value for name, value in (record.get("training") or {}).items() if name not in SEEDS},
        **{name: record.get(name) for name in ("tasks", "items", "generation")},
        "inputs": (record.get("inputs"), trained.get("inputs")),
    }
    if not record:
        facts["config"] = {name: run.config.get(name) for name in ("trainer", "data")}
    return json.dumps(facts, sort_keys=True, default=str)


def group_runs(runs: Sequence[Run], names: Sequence[str] | None = None) -> list[Group]:
    """Group runs by configuration, in the order of their first runs.

    Args:
        runs: The runs.
        names: Name of each run, which then decides: runs of the same name form a group.

    Raises:
        ReportError: If there are not as many names as runs, or runs of different configurations have the same name.
    """
    if names is not None:
        return _named(runs, names)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(identity(run), []).append(run)
    members = [sorted(group, key=lambda run: (run.seed is None, run.seed)) for group in groups.values()]
    return [Group(label, tuple(group)) for label, group in zip(_labels(members), members, strict=True)]


def _named(runs: Sequence[Run], names: Sequence[str]) -> list[Group]:
    if len(names) != len(runs):
        raise ReportError(f"{len(runs)} runs need as many names, got {len(names)} ({', '.join(names)})")
    groups: dict[str, list[Run]] = {}
    for name, run in zip(names, runs, strict=True):
        groups.setdefault(name, []).append(run)
    for name, group in groups.items():
        other = next((run for run in group if identity(run) != identity(group[0])), None)
        if other is not None:
            raise ReportError(
                f"the runs {group[0].folder} and {other.folder} have the name {name!r} and different settings: give "
                "them different names"
            )
    return [Group(name, tuple(group)) for name, group in groups.items()]


# labels --------------------------------------------------------------------------------------------------------------


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Return a different label for each group."""
    found = [_method(group[0]) for group in groups]
    for label in {label for label in found if label and found.count(label) > 1}:
        same = [number for number, other in enumerate(found) if other == label]
        for number, more in zip(same, _differing([groups[number][0] for number in same]), strict=True):
            found[number] = f"{label}, {more}" if more else label
    settings = _differing([group[0] for group in groups])
    folders = run_names([group[0].folder for group in groups])
    found = [label or more or folder for label, more, folder in zip(found, settings, folders, strict=True)]
    return [label if found.count(label) == 1 else f"{label} ({folders[n]})" for n, label in enumerate(found)]


def _method(run: Run) -> str:
    """Return the name of a run's method, with the control that it is; empty if it has none."""
    rows = rows_of(run.record)
    overlays = _overlays(run.point)
    known = {row.key.partition("/")[0]: row.method for row in ROWS}
    stems = [Path(name).stem for name in overlays]
    name = rows[0].method if rows else ", ".join(known.get(stem, stem.replace("_", " ")) for stem in stems)
    blind = bool((run.record.get("inputs") or {}).get("shuffle_features"))
    return f"{name}, {SHUFFLED}" if blind and rows else name


def _overlays(point: Mapping[str, Any]) -> list[str]:
    named = point.get(OVERLAYS) or []
    return [named] if isinstance(named, str) else list(named)


def _differing(runs: Sequence[Run]) -> list[str]:
    """Return for each run the settings of its sweep's point in which the runs differ."""
    each = [dict(_settings(run.point)) for run in runs]
    names = list(dict.fromkeys(name for settings in each for name in settings))
    varying = [name for name in names if len({json.dumps(some.get(name), default=str) for some in each}) > 1]
    brief = {name: name.rpartition(".")[2] for name in varying}
    brief = {name: last if list(brief.values()).count(last) == 1 else name for name, last in brief.items()}
    return [
        ", ".join(f"{brief[name]}={_written(some[name])}" for name in varying if name in some) if len(runs) > 1 else ""
        for some in each
    ]


def _written(value: Any) -> str:
    """Return a setting's value for a label; a list of names is joined.

    >>> _written(["pet", "bias"]), _written(8), _written(None)
    ('pet + bias', '8', 'null')
    """
    names = isinstance(value, list) and value and all(isinstance(one, str) for one in value)
    return " + ".join(value) if names else short(value)


def _settings(point: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in flattened(point):
        if name not in (SEED, OVERLAYS):
            yield name, value


def best(groups: Sequence[Group]) -> Group | None:
    """Return the group with the highest average."""
    known = [(value.mean, group) for group in groups if (value := group.average()) is not None]
    return max(known, key=lambda pair: pair[0] if math.isfinite(pair[0]) else -math.inf)[1] if known else None
