"""Signals that end a resumable run: clusters, torchrun and sweeps send SIGTERM or SIGUSR1."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ENOUGH = 0  # no signal has this number
before_leaving: list[Callable[[], None]] = []  # called when a signal ends the process without unwinding
_before: dict[int, Any] = {}  # handlers replaced by leave_when_asked()


class Preempted(SystemExit):
    """The run was asked to end and can be resumed."""


def leave_it_to_the_run(worker: int) -> None:
    """Ignore signals in a data loading process: SLURM and terminals send them to every process, but the run ends it.

    Args:
        worker: Number of the worker, as DataLoader's ``worker_init_fn`` receives it.
    """
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # if the run is killed, torch's worker notices that its parent is gone


@cache
def end_workers_at_exit() -> None:
    """End data loading processes that are left when this process exits, as after an error in one of them.

    Python would ask them by SIGTERM and wait; they ignore it, see :func:`leave_it_to_the_run`.
    """
    atexit.register(_end_workers)  # runs before the function that waits, which was registered earlier


def _end_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them as lost
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def leave_when_asked() -> None:
    """Exit at once, with status 75, on a signal; until training begins there is nothing to save.

    A separate thread exits the process: the main thread may be blocked in a collective on a rank that has ended, where
    Python runs no handler.
    """
    asked, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told)
    for number in SIGNALS:
        _before.setdefault(number, signal.signal(number, _note))
    Thread(target=_wait, args=(asked, told), daemon=True).start()


def stay() -> None:
    """Stop exiting at once, because a checkpoint is now written first. Signal handlers are left unchanged."""
    told = signal.set_wakeup_fd(-1)
    if told != -1:
        os.write(told, bytes([ENOUGH]))


def _note(number: int, frame: Any) -> None:
    """Do nothing; a Python handler must exist for the thread to be notified."""


def _hold() -> None:
    if _before:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _let_go() -> None:
    if _before:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _in_a_forked_process() -> None:
    """Restore default signal handling in a forked process, which has no thread and shares the pipe with the run."""
    before_leaving.clear()
    if _before:
        signal.set_wakeup_fd(-1)
        for number in list(_before):
            if signal.getsignal(number) is _note:
                signal.signal(number, signal.SIG_DFL)
        _before.clear()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_in_a_forked_process)


def undo() -> None:
    """Undo :func:`leave_when_asked` at the end of a run; does nothing if it was not called."""
    stay()
    for number in list(_before):
        signal.signal(number, _before.pop(number) or signal.SIG_DFL)


def _wait(asked: int, told: int) -> None:
    while True:
        number = os.read(asked, 1)[0]
        if number == ENOUGH:
            os.close(asked)
            os.close(told)
            return
        if number in SIGNALS:
            for child in _children():  # ranks started by this process may have received no signal
                with suppress(ProcessLookupError):
                    os.kill(child, number)
            for act in list(before_leaving):
                with suppress(Exception):
                    act()
            os.write(2, b"asked to end while not training: nothing to save, the run can be resumed\n")
            os._exit(STATUS)


def _children() -> list[int]:
    found = list[int]()
    for file in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, file.read_text().split())
    return found
