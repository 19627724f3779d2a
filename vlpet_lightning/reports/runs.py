"""Finished runs: where they are, what they scored, and what they were trained with."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from vlpet_lightning.loggers import read_metrics, read_protocols
from vlpet_lightning.protocol import records_in
from vlpet_lightning.published.table import main_scores

STAGE = "test"
METRICS = "metrics.csv"
CONFIGS = ("config.yaml", "test.yaml")  # of a training; of weights that were tested without one
RUN_FILE, POINT = "run.txt", "args.json"  # of a point in the folder of a sweep: its run folder, its settings
Scores = dict[str, dict[str, float]]  # "vqa" -> {"accuracy": ...}


class ReportError(ValueError):
    """Raised if no report can be written; the message names the run and the cure."""


@dataclass(frozen=True)
class Run:
    """A run with test scores.

    Args:
        folder: The run folder.
        scores: Last test scores by task and metric.
        point: Settings of the sweep's point that the run belongs to; empty for other runs.
    """

    folder: Path
    scores: Scores
    point: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def records(self) -> dict[str, dict[str, Any]]:
        """Protocol records of the last test scores by digest: one, unless tasks were tested at different times."""
        known = records_in(self.folder)
        digests = dict.fromkeys(read_protocols(self.folder, STAGE).values())
        return {digest: known[digest] for digest in digests if digest in known}

    @property
    def record(self) -> dict[str, Any]:
        """The protocol record; empty for a run that was tested without one."""
        return next(iter(self.records.values()), {})

    @cached_property
    def config(self) -> dict[str, Any]:
        """The saved config; empty if there is none."""
        for name in CONFIGS:
            if (self.folder / name).is_file():
                found = yaml.safe_load((self.folder / name).read_text())
                return found if isinstance(found, dict) else {}
        return {}

    @property
    def seed(self) -> int | None:
        """Seed of the training."""
        found = (self.record.get("trained") or self.record).get("seed", self.config.get("seed_everything"))
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    @property
    def mains(self) -> dict[str, float]:
        """Main score of each task."""
        return main_scores(self.scores)

    @cached_property
    def rows(self) -> list[dict[str, float]]:
        """Rows of ``metrics.csv``."""
        return read_metrics(self.folder)

    def prediction_file(self, task: str) -> Path:
        """Return the file of the test predictions of a task."""
        return self.folder / "predictions" / f"{STAGE}_{task}.json"


def read_scores(run: Path) -> Scores:
    """Return the last test scores of a run, by task.

    Raises:
        FileNotFoundError: If the run has no test scores.
    """
    found: Scores = {}
    for row in read_metrics(run):
        for name, value in row.items():
            stage, _, rest = name.partition("/")
            task, _, metric = rest.partition("/")
            if stage == STAGE and metric:
                found.setdefault(task, {})[metric] = value
    if not found:
        raise FileNotFoundError(
            f"no test scores in {run / METRICS}: run `python -m vlpet_lightning test --config {run}/config.yaml "
            f"--ckpt_path {run}/checkpoints/last.ckpt` first"
        )
    return found


def find_runs(paths: Sequence[Path]) -> tuple[list[Run], list[Path]]:
    """Find the tested runs in folders.

    Args:
        paths: Folders of runs, of sweeps, or folders that contain such folders at any depth.

    Returns:
        The runs, each once, and the folders of runs without test scores. In the folder of a sweep, a point's run may
        be anywhere: the point names it.

    Raises:
        FileNotFoundError: If a folder does not exist, contains no run, or is itself a run without test scores.
    """
    found: dict[Path, Run] = {}
    untested: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(f"there is no folder {path}: give the folders of runs, or of a sweep")
        places = list(_places(path))
        if not places:
            raise FileNotFoundError(
                f"no run in {path}: the folder of a run has a {METRICS}, that of a sweep its points"
            )
        for folder, point in places:
            key = folder.resolve()
            if folder == path:
                found[key] = Run(folder, read_scores(folder), point)
                continue
            try:
                scores = read_scores(folder)
            except FileNotFoundError:
                untested[folder] = None
            else:
                if key not in found or point:  # the same run by its own folder and by its sweep
                    found[key] = Run(folder, scores, point)
    return list(found.values()), list(untested)


def run_names(runs: Sequence[Path]) -> list[str]:
    """Return short names of run folders, all different; ``version_N`` alone says nothing.

    >>> run_names([Path("runs/lora/version_0"), Path("runs/vlpet/version_0")])
    ['lora/version_0', 'vlpet/version_0']
    """
    parts = [run.resolve().parts for run in runs]
    names = ["/".join(own[-2 if re.fullmatch(r"version_\d+", own[-1]) else -1 :]) for own in parts]
    names = names if len(set(names)) == len(names) else [str(run) for run in runs]
    return names if len(set(names)) == len(names) else [f"{name} ({i})" for i, name in enumerate(names, start=1)]


def _places(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the run folders below a folder, with the settings of their points."""
    if (path / METRICS).is_file():
        yield path, {}
        return
    for parent, folders, files in os.walk(path, followlinks=True):
        folders.sort()
        place = Path(parent)
        if METRICS in files:
            folders.clear()
            yield place, {}
        elif RUN_FILE in files:
            folders.clear()
            yield _shortened(_moved(Path((place / RUN_FILE).read_text().strip()), place)), _point(place / POINT)


def _moved(run: Path, point: Path) -> Path:
    """Return a point's run folder; if the project was moved or copied, its place relative to the sweep's folder."""
    if run.is_dir() or not run.is_absolute():
        return run
    for above in point.resolve().parents:
        for start in range(1, len(run.parts)):
            candidate = above.joinpath(*run.parts[start:])
            if (candidate / METRICS).is_file():
                return candidate
    return run


def _shortened(run: Path) -> Path:
    """Return a path relative to the working directory if it is below it."""
    here = Path.cwd()
    return run.relative_to(here) if run.is_relative_to(here) else run


def _point(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
