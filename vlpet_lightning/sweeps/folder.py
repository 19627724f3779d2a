"""The folder of a sweep: what its points are, what became of each, and the results.

::

    points.json        the points, fixed at the first start
    results.csv        a line a point, written anew whenever one ends
    0000/args.json     the point's settings, laid over the experiment
    0000/command.sh    what runs it; also by hand
    0000/log.txt       its output
    0000/run.txt       the run's own folder, with its metrics and checkpoints
    0000/pid           the process that ran it last, on the machine of the launcher
    0000/ended         its exit status, once it has ended
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import os
import secrets
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from vlpet_lightning.atomic_file import atomic_write
from vlpet_lightning.loggers import read_metrics
from vlpet_lightning.run.resume import AUTO, RECORD, RUN
from vlpet_lightning.run.signals import STATUS as PREEMPTED
from vlpet_lightning.sweeps.plan import ARGS_FILE, Sweep, SweepError, setting, short_names

RUN_FOLDER = "run.txt"
State = Literal["waiting", "running", "interrupted", "finished", "failed"]
STYLES = {"finished": "green", "failed": "bold red", "interrupted": "yellow", "waiting": "dim", "running": "cyan"}
POINTS = "points.json"


@dataclass(frozen=True)
class Outcome:
    """What became of a point.

    Args:
        number: Of the point.
        state: Whether it has ended, and how.
        value: The metric's last value; None where it was not logged.
        step: At which step.
    """

    number: int
    state: State
    value: float | None
    step: int | None


def points_of(path: Path) -> int:
    """How many points a sweep's folder has; 0 where there is none."""
    file = path / POINTS
    return len(json.loads(file.read_text())["points"]) if file.is_file() else 0


class SweepFolder:
    """A sweep's folder.

    Args:
        path: The folder; made if it is not there.
        sweep: The sweep.

    Raises:
        SweepError: If the folder is another sweep's, or the sweep file was changed since.
    """

    def __init__(self, path: Path, sweep: Sweep) -> None:
        self.path = path.absolute()
        self.sweep = sweep
        self.running: set[int] = set()  # by this process, or by SLURM
        file = self.path / POINTS
        points = json.loads(json.dumps(sweep.points))
        begun: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"words": sweep.words, "points": []}
        both = min(len(begun["points"]), len(points))
        if begun["words"] != sweep.words or begun["points"][:both] != points[:both]:
            raise SweepError(
                f"{sweep.path} has other points or another command than when {path} was begun: undo the change, or "
                "give --out another folder"
            )
        # runs, and W&B, tell sweeps of one name apart by it
        self.id: str = begun.get("id") or secrets.token_hex(3)
        if len(points) > len(begun["points"]) or not file.is_file():
            self._make_folder()
            for number in range(len(begun["points"]), len(points)):
                self._prepare(number)
            record = {"id": self.id, "words": sweep.words, "points": points}
            write_whole(file, json.dumps(record, indent=1) + "\n")  # last: with it the folder is complete

    def _make_folder(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise SweepError(f"the sweep's folder {self.path} is a file, or below one: give --out a folder") from error

    def of(self, number: int) -> Path:
        """The folder of a point."""
        return self.path / f"{number:04d}"

    def run_name(self, number: int) -> str:
        """The name of a point's run, see :mod:`vlpet_lightning.run.resume`."""
        return f"{self.sweep.slug}-{self.id}_{number:04d}"

    def words(self, number: int) -> list[str]:
        """The arguments of ``fit`` that run a point."""
        args = str(self.of(number) / "args.json")
        words = [args if word == ARGS_FILE else word for word in self.sweep.words]
        return [*words, "--ckpt_path", AUTO]

    def _prepare(self, number: int) -> None:
        folder = self.of(number)
        folder.mkdir(exist_ok=True)
        write_whole(folder / "args.json", json.dumps(self.sweep.points[number], indent=1) + "\n")
        command = shlex.join([sys.executable, "-m", "vlpet_lightning", "fit", *self.words(number)])
        name = shlex.quote(self.run_name(number))
        record = shlex.quote(str(folder / RUN_FOLDER))
        where = shlex.quote(str(Path.cwd()))
        lines = ["#!/bin/bash", f"cd {where}", f"export {RUN}={name} {RECORD}={record}"]
        lines += ['export WANDB_MODE="${WANDB_MODE:-offline}"', f"exec {command}"]
        write_whole(folder / "command.sh", "\n".join(lines) + "\n")

    @contextmanager
    def locked(self) -> Iterator[int]:
        """For one launcher at a time; runs inherit the file, so that those of a killed launcher keep it locked, too.

        Raises:
            SweepError: If another one, or a run of it, is at work.
        """
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                runs = [f"{self.of(number).name} in process {pid}" for number, pid in self._alive()]
                raise SweepError(
                    f"the sweep in {self.path}, or a run of one that was killed, is still going"
                    + (f" ({', '.join(runs)})" if runs else "")
                    + ": wait for it, or end it"
                ) from error
            yield file.fileno()

    def began(self, number: int, pid: int) -> None:
        """Take down that a process runs a point."""
        write_whole(self.of(number) / "pid", f"{pid}\n")
        self.running.add(number)

    def _alive(self) -> Iterator[tuple[int, int]]:
        for number in range(len(self.sweep.points)):
            with suppress(OSError, ValueError):
                pid = int((self.of(number) / "pid").read_text())
                if str(self.of(number)).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    yield number, pid

    def state(self, number: int) -> State:
        """Whether a point has ended, and how."""
        if number in self.running:
            return "running"
        folder = self.of(number)
        try:
            status = int((folder / "ended").read_text())
        except (OSError, ValueError):
            return "interrupted" if (folder / "log.txt").exists() else "waiting"
        return "finished" if status == 0 else "interrupted" if status == PREEMPTED else "failed"

    def end(self, number: int, status: int) -> None:
        """Take down how a point has ended."""
        self.running.discard(number)
        write_whole(self.of(number) / "ended", f"{status}\n")

    def todo(self, retry_failed: bool) -> list[int]:
        """The points to run."""
        done = {"finished"} if retry_failed else {"finished", "failed"}
        return [number for number in range(len(self.sweep.points)) if self.state(number) not in done]

    def outcome(self, number: int) -> Outcome:
        """What became of a point."""
        found: tuple[float | None, int | None] = (None, None)
        metric = self.sweep.metric
        run = self.of(number) / RUN_FOLDER
        if metric is not None and run.is_file():
            for row in read_metrics(Path(run.read_text().strip())):
                if metric.name in row:
                    found = (row[metric.name], int(row["step"]) if "step" in row else None)
        return Outcome(number, self.state(number), *found)

    def outcomes(self) -> list[Outcome]:
        """Of all points, the best first."""
        maximize = self.sweep.metric is not None and self.sweep.metric.maximize

        def key(outcome: Outcome) -> tuple[bool, float, int]:
            value = outcome.value
            if value is None or math.isnan(value):
                return True, 0.0, outcome.number
            return False, -value if maximize else value, outcome.number

        return sorted(map(self.outcome, range(len(self.sweep.points))), key=key)

    def write_results(self) -> None:
        """Write ``results.csv``."""
        metric = "metric" if self.sweep.metric is None else self.sweep.metric.name
        buffer = io.StringIO()
        table = csv.writer(buffer)
        table.writerow(["point", "state", metric, "step", *self.sweep.varying, "log"])
        for outcome in sorted(self.outcomes(), key=lambda one: one.number):
            settings = [_shown(setting(self.sweep.points[outcome.number], name)) for name in self.sweep.varying]
            cells = [outcome.number, outcome.state, outcome.value, outcome.step]
            table.writerow([*cells, *settings, self.of(outcome.number) / "log.txt"])
        write_whole(self.path / "results.csv", buffer.getvalue())

    def table(self) -> Table:
        """The results for people, the best first."""
        metric = "metric" if self.sweep.metric is None else self.sweep.metric.name
        table = Table("point", "state", title=f"sweep {self.sweep.name}: {self.path}")
        for name in (metric, "step"):
            table.add_column(name, justify="right")
        for short in short_names(self.sweep.varying).values():
            table.add_column(short, overflow="fold")
        for outcome in self.outcomes():
            settings = [_shown(setting(self.sweep.points[outcome.number], name)) for name in self.sweep.varying]
            value = "" if outcome.value is None else f"{outcome.value:.4g}"
            step = "" if outcome.step is None else f"{outcome.step:,}"
            state = Text(outcome.state, style=STYLES[outcome.state])
            table.add_row(f"{outcome.number:04d}", state, value, step, *settings)
        return table


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is there in whole or not at all."""
    with atomic_write(path, f".{os.getpid()}.part") as file:
        file.write(text.encode())
