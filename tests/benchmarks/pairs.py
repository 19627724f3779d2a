"""Interleaved timing: contenders take turns in one process, and are compared round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table


@dataclass(frozen=True)
class Timing:
    """Times of one contender.

    Args:
        name: Name in the table.
        seconds: Median of its rounds.
        fastest: Shortest round.
        slowest: Longest round.
        speedup: Median over rounds of the reference's time divided by this contender's time in the same round.
        samples: Samples per round.
    """

    name: str
    seconds: float
    fastest: float
    slowest: float
    speedup: float
    samples: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"samples_per_second": self.samples / self.seconds}


def wait(device: str) -> None:
    """Wait until the device has finished."""
    if device == "cuda":
        torch.cuda.synchronize()


def has_fast_bf16(device: str) -> bool:
    """Return whether the device multiplies matrices in bf16 by its own instructions."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """Return the time of one call, including the device's work.

    With one thread on a CPU it is the time that the process was running, so that other processes matter less.
    """
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    wait(device)
    start = clock()
    work()
    wait(device)
    return clock() - start


def interleaved(
    works: Mapping[str, Callable[[], Any]],
    *,
    samples: int,
    rounds: int = 5,
    warm_up: int = 1,
    device: str = "cpu",
    console: Console | None = None,
) -> list[Timing]:
    """Time contenders in turns.

    Args:
        works: Work of one round, by the contender's name; the first one is the reference of all ratios.
        samples: Samples that each contender processes in a round.
        rounds: Number of rounds.
        warm_up: Rounds that are not counted.
        device: ``cpu`` or ``cuda``.
        console: Where to show progress; None shows none.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    with Progress(console=console or Console(quiet=True), transient=True) as progress:
        bar = progress.add_task("timing", total=(rounds + warm_up) * len(works))
        for number in range(warm_up + rounds):
            for name, work in works.items():
                seconds = seconds_of(work, device)
                progress.advance(bar)
                if number >= warm_up:
                    times[name].append(seconds)
    reference = times[next(iter(works))]
    return [
        Timing(
            name,
            statistics.median(found),
            min(found),
            max(found),
            statistics.median(theirs / ours for theirs, ours in zip(reference, found, strict=True)),
            samples,
        )
        for name, found in times.items()
    ]


def timing_table(title: str, timings: list[Timing]) -> Table:
    """Return a table of times, rates and ratios."""
    table = Table(title=title)
    for column in ("", "ms: median", "min - max", "samples/s", f"speed against {timings[0].name}"):
        table.add_column(column, justify="left" if not column else "right")
    for timing in timings:
        table.add_row(
            timing.name,
            f"{1000 * timing.seconds:.0f}",
            f"{1000 * timing.fastest:.0f} - {1000 * timing.slowest:.0f}",
            f"{timing.samples / timing.seconds:.1f}",
            f"{timing.speedup:.2f}",
        )
    return table
