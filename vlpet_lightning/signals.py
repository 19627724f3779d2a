"""What ends a run that can go on: clusters, torchrun and sweeps ask with SIGTERM or SIGUSR1."""

from __future__ import annotations

import os
import signal
from typing import Any

STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """The run was asked to end, and can go on."""


def leave_it_to_the_run(worker: int) -> None:
    """In a process that loads data: the run ends it, not a signal that SLURM or a terminal sends to every process.

    Args:
        worker: Its number, as DataLoader's ``worker_init_fn`` gets it.
    """
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # where the run is killed, torch's worker sees that its parent is gone


def leave_when_asked() -> None:
    """End at once, with status 75, on a signal: until training begins there is nothing to save."""
    for number in SIGNALS:
        signal.signal(number, _leave)


def _leave(number: int, frame: Any) -> None:
    os.write(2, b"asked to end while not training: nothing to save, the run can go on\n")
    raise Preempted(STATUS)
