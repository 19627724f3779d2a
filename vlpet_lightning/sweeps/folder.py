"""The folder of a sweep: points, their states, and results.

::

    points.json        the points, fixed at the first start
    results.csv        one line per point, rewritten whenever a point starts or ends
    0000/args.json     the point's settings, merged over the experiment
    0000/command.sh    the point's command, which can also be run by hand
    0000/log.txt       output
    0000/run.txt       path of the run folder, with metrics and checkpoints
    0000/pid           the process that last ran the point, on the launcher's machine
    0000/ended         exit status of the training, once it has ended
    0000/test.sh       the command that tests the point's checkpoint, in a sweep with tests
    0000/tested        exit status of the test, once it has ended
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
from collections.abc import Iterator, Sequence
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
PROGRAM = (sys.executable, "-m", "vlpet_lightning")
Tested = Literal["last", "best"]  # checkpoint that is tested


@dataclass(frozen=True)
class Outcome:
    """State and result of a point.

    Args:
        number: Index of the point.
        state: Whether and how the point has ended.
        value: Last value of the metric; None if it was not logged.
        step: Step at which the value was logged.
    """

    number: int
    state: State
    value: float | None
    step: int | None


def points_of(path: Path) -> int:
    """Return the number of points in a sweep folder; 0 if the folder does not exist."""
    file = path / POINTS
    return len(json.loads(file.read_text())["points"]) if file.is_file() else 0


class SweepFolder:
    """The folder of a sweep.

    Args:
        path: The folder; created if it does not exist.
        sweep: The sweep.
        test: Checkpoint to test after the training of a point: ``last`` or ``best``; None for no test. A sweep that
            was run without tests can be repeated with them.

    Raises:
        SweepError: If the folder belongs to another sweep, or the sweep file has changed since it was created.
    """

    def __init__(self, path: Path, sweep: Sweep, test: Tested | None = None) -> None:
        self.path = path.absolute()
        self.sweep = sweep
        self.test = test
        self.running: set[int] = set()  # run by this process or by SLURM
        file = self.path / POINTS
        points = json.loads(json.dumps(sweep.points))
        begun: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"words": sweep.words, "points": []}
        both = min(len(begun["points"]), len(points))
        if begun["words"] != sweep.words or begun["points"][:both] != points[:both]:
            raise SweepError(
                f"{sweep.path} has other points or another command than when {path} was created: undo the change, or "
                "give --out another folder"
            )
        # distinguishes the runs of sweeps with the same name, in our folders and in W&B
        self.id: str = begun.get("id") or secrets.token_hex(3)
        if len(points) > len(begun["points"]) or not file.is_file():
            self._make_folder()
            for number in range(len(begun["points"]), len(points)):
                self._prepare(number)
            record = {"id": self.id, "words": sweep.words, "points": points}
            write_whole(file, json.dumps(record, indent=1) + "\n")  # written last: it marks the folder as complete
        if test is not None:
            for number in range(len(points)):
                self._prepare_test(number, test)

    def _make_folder(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise SweepError(f"the sweep's folder {self.path} is a file, or below one: give --out a folder") from error

    def of(self, number: int) -> Path:
        """Return the folder of a point."""
        return self.path / f"{number:04d}"

    def run_name(self, number: int) -> str:
        """Return the name of a point's run, see :mod:`vlpet_lightning.run.resume`."""
        return f"{self.sweep.slug}-{self.id}_{number:04d}"

    def words(self, number: int) -> list[str]:
        """Return the arguments of ``fit`` and ``test`` for a point, without the checkpoint."""
        args = str(self.of(number) / "args.json")
        return [args if word == ARGS_FILE else word for word in self.sweep.words]

    def _prepare(self, number: int) -> None:
        folder = self.of(number)
        folder.mkdir(exist_ok=True)
        write_whole(folder / "args.json", json.dumps(self.sweep.points[number], indent=1) + "\n")
        command = shlex.join([*PROGRAM, "fit", *self.words(number), "--ckpt_path", AUTO])
        name = shlex.quote(self.run_name(number))
        record = shlex.quote(str(folder / RUN_FOLDER))
        self._write_script(folder / "command.sh", [f"export {RUN}={name} {RECORD}={record}", f"exec {command}"])

    def _prepare_test(self, number: int, test: Tested) -> None:
        folder = self.of(number)
        command = shlex.join([*PROGRAM, "test", *self.words(number), "--ckpt_path"])
        run = f'run="$(cat {shlex.quote(str(folder / RUN_FOLDER))})"'
        found = f'checkpoint="$(ls -t "$run"/checkpoints/{test}*.ckpt | head -n 1)"'
        self._write_script(folder / "test.sh", [run, found, f'exec {command} "${{checkpoint:?no {test} checkpoint}}"'])

    @staticmethod
    def _write_script(path: Path, lines: Sequence[str]) -> None:
        where = shlex.quote(str(Path.cwd()))
        head = ["#!/bin/bash", f"cd {where}", 'export WANDB_MODE="${WANDB_MODE:-offline}"']
        write_whole(path, "\n".join([*head, *lines]) + "\n")

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Hold the sweep's file lock, so that only one launcher runs at a time.

        Runs inherit the file descriptor, so the runs of a killed launcher also keep the lock.

        Yields:
            The file descriptor of the lock.

        Raises:
            SweepError: If another launcher or one of its runs is still running.
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
        """Record the process that runs a point."""
        write_whole(self.of(number) / "pid", f"{pid}\n")
        self.running.add(number)

    def _alive(self) -> Iterator[tuple[int, int]]:
        for number in range(len(self.sweep.points)):
            with suppress(OSError, ValueError):
                pid = int((self.of(number) / "pid").read_text())
                if str(self.of(number)).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    yield number, pid

    def state(self, number: int) -> State:
        """Return the state of a point."""
        if number in self.running:
            return "running"
        status = self._status(number, "ended")
        if status == 0 and self.test is not None:
            status = self._status(number, "tested")
        if status is None:
            return "interrupted" if (self.of(number) / "log.txt").exists() else "waiting"
        return "finished" if status == 0 else "interrupted" if status == PREEMPTED else "failed"

    def _status(self, number: int, name: str) -> int | None:
        """Return the exit status in a point's file; None if there is none yet."""
        try:
            return int((self.of(number) / name).read_text())
        except (OSError, ValueError):
            return None

    def next_step(self, number: int) -> tuple[str, str]:
        """Return a point's next script, and the file for its exit status: of its training, or of its test."""
        trained = self._status(number, "ended") == 0
        return ("test.sh", "tested") if trained and self.test is not None else ("command.sh", "ended")

    def end(self, number: int, name: str, status: int) -> None:
        """Record the exit status of a point's training (``ended``) or test (``tested``)."""
        self.running.discard(number)
        write_whole(self.of(number) / name, f"{status}\n")

    def todo(self, retry_failed: bool) -> list[int]:
        """Return the points that remain to be run."""
        done = {"finished"} if retry_failed else {"finished", "failed"}
        return [number for number in range(len(self.sweep.points)) if self.state(number) not in done]

    def outcome(self, number: int) -> Outcome:
        """Return the outcome of a point."""
        found: tuple[float | None, int | None] = (None, None)
        metric = self.sweep.metric
        run = self.of(number) / RUN_FOLDER
        if metric is not None and run.is_file():
            for row in read_metrics(Path(run.read_text().strip())):
                if metric.name in row:
                    found = (row[metric.name], int(row["step"]) if "step" in row else None)
        return Outcome(number, self.state(number), *found)

    def outcomes(self) -> list[Outcome]:
        """Return the outcomes of all points, best first."""
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
        """Return the results as a table for the terminal, best first."""
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
    """Write a text file atomically."""
    with atomic_write(path, f".{os.getpid()}.part") as file:
        file.write(text.encode())
