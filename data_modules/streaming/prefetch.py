"""Background threads that prefetch shards."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from threading import Condition, Thread
from typing import Any

IDLE = 5.0  # seconds after which an idle thread ends
AGAIN = 60.0  # seconds for which a failed job is not prefetched again


class Prefetcher:
    """Background threads that call ``job(number)`` for the shards that stores need next.

    Errors are ignored: the reader that needs the shard retries and reports the error.

    Args:
        threads: Number of parallel jobs; 0 turns prefetching off.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._start_over()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.threads,)

    def want(self, job: Callable[[int], object], owner: str, numbers: Sequence[int]) -> None:
        """Request numbers to prefetch, the most urgent first; replaces the owner's previous request."""
        if os.getpid() != self._process:  # a forked process has no threads
            self._start_over()
        with self._changed:
            now = time.monotonic()
            self._wanted[owner] = (job, [n for n in numbers if self._failed.get((owner, n), now) <= now])
            for _ in range(self.threads - self._running if self._wanted[owner][1] else 0):
                Thread(target=self._run, daemon=True).start()
                self._running += 1
            self._changed.notify_all()

    def _start_over(self) -> None:
        self._process = os.getpid()
        self._changed = Condition()
        self._wanted: dict[str, tuple[Callable[[int], object], list[int]]] = {}
        self._failed: dict[tuple[str, int], float] = {}  # time until which each is skipped
        self._running = 0

    def _run(self) -> None:
        while True:
            with self._changed:
                owner = self._next_owner()
                if owner is None:
                    self._running -= 1
                    return
                job, numbers = self._wanted[owner]
                number = numbers.pop(0)
            try:
                job(number)
            except Exception:  # any error: the thread continues, and the reader that needs the shard gets the error
                with self._changed:
                    self._failed[owner, number] = time.monotonic() + AGAIN

    def _next_owner(self) -> str | None:
        while not any(numbers for _, numbers in self._wanted.values()):
            if not self._changed.wait(IDLE):
                return None
        return next(owner for owner, (_, numbers) in self._wanted.items() if numbers)
