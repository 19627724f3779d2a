"""Local launcher: runs the points of a sweep as processes on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vlpet_lightning.sweeps.folder import SweepFolder

ASK = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # from a user, a cluster, or a closed terminal
GRACE = 120.0  # seconds for a run to write its checkpoint after it was asked to end
POLL = 0.2


class Stopped(SystemExit):
    """Raised if the sweep was asked to end, after its runs have written checkpoints."""


def run_here(
    folder: SweepFolder, numbers: Sequence[int], *, lock: int, at_once: int, devices: Sequence[str], console: Console
) -> None:
    """Run points, several at a time.

    On a signal from :data:`ASK`, running points are asked to write a checkpoint and end.

    Args:
        folder: Folder of the sweep.
        numbers: Points to run.
        lock: File descriptor that runs inherit, see :meth:`SweepFolder.locked`.
        at_once: Maximum number of concurrent points.
        devices: ``CUDA_VISIBLE_DEVICES`` of each concurrent point; if empty, the variable is left unchanged.
        console: Console for progress.

    Raises:
        Stopped: If the sweep was asked to end.
    """
    waiting, running = list(numbers), dict[int, _Step]()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, _children(folder, running) as asked:
        bar = progress.add_task(f"sweep {folder.sweep.name}", total=len(numbers))
        while waiting or running:
            if asked:
                raise Stopped(128 + asked[0])
            free = [place for place in range(at_once) if place not in {step.place for step in running.values()}]
            for place in free[: len(waiting)]:
                number = waiting.pop(0)
                running[number] = _start(folder, number, lock, place, devices)
                folder.began(number, running[number].process.pid)
                folder.write_results()
            for number in [number for number, step in running.items() if step.process.poll() is not None]:
                step = running.pop(number)
                folder.end(number, step.status, step.process.returncode)
                folder.write_results()
                outcome = folder.outcome(number)
                if step.process.returncode == 0 and outcome.state != "finished":  # trained, and now to be tested
                    waiting.insert(0, number)
                    continue
                value = "" if outcome.value is None else f": {outcome.value:.4g}"
                progress.console.print(f"{folder.run_name(number)} {outcome.state}{value}", soft_wrap=True)
                progress.advance(bar)
            time.sleep(POLL)


class _Step(NamedTuple):
    """A running script of a point."""

    place: int  # among those that run at the same time
    status: str  # file for the exit status
    process: subprocess.Popen


def _start(folder: SweepFolder, number: int, lock: int, place: int, devices: Sequence[str]) -> _Step:
    device = {"CUDA_VISIBLE_DEVICES": devices[place % len(devices)]} if devices else {}
    script, status = folder.next_step(number)
    (folder.of(number) / status).unlink(missing_ok=True)
    with (folder.of(number) / "log.txt").open("a") as log:
        process = subprocess.Popen(
            ["bash", str(folder.of(number) / script)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **device},
            pass_fds=[lock],
            start_new_session=True,  # Ctrl-C reaches only this process, which then asks the runs to end
        )
    return _Step(place, status, process)


@contextmanager
def _children(folder: SweepFolder, running: Mapping[int, _Step]) -> Iterator[list[int]]:
    """Record the signals in :data:`ASK`, and end all runs when the block is left."""
    asked: list[int] = []  # checked between starts: an exception during a start could lose the process

    def note(number: int, frame: Any) -> None:
        asked.append(number)

    before = {number: signal.signal(number, note) for number in ASK}
    try:
        yield asked
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave runs behind
        _end([step.process for step in running.values()])
        folder.running.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.terminate()  # only the run itself: its data-loading workers are needed until it has ended
    end = time.monotonic() + GRACE
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        time.sleep(POLL)
    for process in processes:
        with suppress(ProcessLookupError):  # if no process of the group is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
