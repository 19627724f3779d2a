"""Bounded local cache of shards, shared by processes.

Shards are written atomically. A process that needs a missing shard takes the shard's file lock (``SHARD.lock``; the
kernel releases the locks of a killed process) and fetches it, while other processes wait. Space is reserved under one
lock for the whole folder: files that are being written have their full size from the start. The least recently used
shards are evicted to make room; processes that have mapped an evicted shard can continue to read it.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, overload

from data_modules.store.store import FeatureStoreError

PART, SCRATCH, LOCK = ".part", ".scratch", ".lock"
STORE = ".streamed"  # suffix of a store's folder in the cache
POLL = 0.05  # seconds between checks for space that other processes free


@dataclass(frozen=True)
class Slot:
    """A shard's slot in the cache.

    Args:
        path: The file, ``STORE.streamed/shard-...`` in the cache.
        bytes: Its size.
        scratch: Returns the temporary space needed while the shard is written.
        fill: Writes ``bytes`` to the first file; the second is a temporary file, removed afterwards.
    """

    path: Path
    bytes: int
    scratch: Callable[[], int]
    fill: Callable[[BinaryIO, BinaryIO], None]


class ShardCache:
    """A least-recently-used cache of shards, filled on demand.

    Args:
        folder: Cache folder on a local disk; created with its parents.
        max_bytes: Maximum total size of all shards, including those that are being written.

    Raises:
        FeatureStoreError: If the folder cannot be created.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        with disk(folder):
            folder.mkdir(parents=True, exist_ok=True)

    @overload
    def open(self, slot: Slot) -> BinaryIO: ...

    @overload
    def open(self, slot: Slot, *, wait: bool) -> BinaryIO | None: ...

    def open(self, slot: Slot, *, wait: bool = True) -> BinaryIO | None:
        """Open a shard, fetching it if it is missing.

        Args:
            slot: The shard.
            wait: Whether to wait for other processes that fetch it, and for free space.

        Returns:
            The open file, which stays readable if the shard is evicted; None if ``wait`` is false and it would have
            to wait.

        Raises:
            FeatureStoreError: If it cannot be fetched, or the disk is full.
        """
        file = _opened(slot)
        if file is not None:
            return file
        with disk(slot.path):
            slot.path.parent.mkdir(parents=True, exist_ok=True)
            with locked(_beside(slot.path, LOCK), wait=wait) as mine:
                if not mine:
                    return None
                return _opened(slot) or self._fetched(slot, wait)

    def _fetched(self, slot: Slot, wait: bool) -> BinaryIO | None:
        part, scratch = _beside(slot.path, PART), _beside(slot.path, SCRATCH)
        for left in (part, scratch):  # left by a killed process, whose lock is now held here
            left.unlink(missing_ok=True)
        with ExitStack() as cleanup:
            cleanup.callback(scratch.unlink, missing_ok=True)
            unfinished = cleanup.enter_context(ExitStack())
            unfinished.callback(part.unlink, missing_ok=True)
            if not self._reserve({part: slot.bytes, scratch: slot.scratch()}, wait):
                return None
            with scratch.open("r+b") as beside, part.open("r+b") as file:
                slot.fill(file, beside)
                file.flush()
                os.fsync(file.fileno())
                opened = part.open("rb")  # before the rename, after which other processes may evict it
            os.replace(part, slot.path)
            unfinished.pop_all()
            return opened

    def _reserve(self, parts: dict[Path, int], wait: bool) -> bool:
        need = sum(parts.values())
        if need > self.max_bytes:
            raise FeatureStoreError(
                f"{next(iter(parts)).stem} needs {need / 1e9:,.3f} GB, the cache {self.folder} may have "
                f"{self.max_bytes / 1e9:,.3f}: raise data.init_args.stream.max_gb"
            )
        while True:
            with locked(self.folder / LOCK):
                if self._make_room(need):
                    for path, size in parts.items():
                        with path.open("wb") as file:
                            file.truncate(size)
                    return True
            if not wait:
                return False
            time.sleep(POLL)

    def _make_room(self, need: int) -> bool:
        whole, free = [], self.max_bytes - need
        for entry in self._entries():
            try:
                status = entry.stat()
            except FileNotFoundError:  # an unfinished file that was renamed or abandoned
                continue
            if entry.name.endswith((PART, SCRATCH)):
                free -= 0 if _removed_if_dead(Path(entry.path)) else status.st_size
            else:
                free -= status.st_size
                whole.append((status.st_mtime_ns, status.st_size, entry.path))
        if free + sum(size for _, size, _ in whole) < 0:
            return False  # files that are being written take all of the space
        for _, size, path in sorted(whole):
            if free >= 0:
                break
            os.unlink(path)
            free += size
        return True

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        for store in os.scandir(self.folder):
            if store.name.endswith(STORE):  # anything else in the folder, such as the user's own stores, is left alone
                for entry in os.scandir(store.path):
                    if entry.name.startswith("shard-") and not entry.name.endswith(LOCK):
                        yield entry


def _opened(slot: Slot) -> BinaryIO | None:
    try:
        file = slot.path.open("rb")
    except FileNotFoundError:
        return None
    if os.fstat(file.fileno()).st_size != slot.bytes:  # modified from outside: fetch it again
        file.close()
        return None
    os.utime(file.fileno())  # mark it as most recently used
    return file


def _removed_if_dead(part: Path) -> bool:
    with locked(_beside(part.with_suffix(""), LOCK), wait=False) as mine:
        if mine:
            part.unlink(missing_ok=True)
        return mine


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a file lock among the processes and threads of this machine; yields whether it was acquired.

    Args:
        path: The lock file; it is not removed.
        wait: Whether to wait for the lock; without waiting it may not be acquired.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing does not release it while a forked process has it open
    finally:
        os.close(descriptor)


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Convert errors of the cache's disk into a :class:`FeatureStoreError` that names the cure."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise FeatureStoreError(
            f"{path} cannot be written ({reason}): free space, lower data.init_args.stream.max_gb, or set "
            "data.init_args.stream.cache to a folder on another disk"
        ) from error
