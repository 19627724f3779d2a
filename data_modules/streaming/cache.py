"""A bounded folder of shards on this machine that many processes share.

A shard gets its name when it is whole and on the disk. Whoever needs one that is not there takes its lock
(``SHARD.lock``; the kernel frees the locks of a process that is killed) and fetches it; others wait, then find it. Room
is reserved under one lock for the whole folder: the parts that are being written have their full size from the start.
The shards used longest ago are removed for it; who has mapped one goes on reading it.
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
STORE = ".streamed"  # how a store's folder in the cache ends
POLL = 0.05  # seconds between looks for room that others are about to free


@dataclass(frozen=True)
class Slot:
    """A shard's place.

    Args:
        path: The file, ``STORE.streamed/shard-...`` in the cache.
        bytes: Its size.
        scratch: Says what room is needed beside it while it is made.
        fill: Writes ``bytes`` to the first file; the second one, for what needs that room, is removed afterwards.
    """

    path: Path
    bytes: int
    scratch: Callable[[], int]
    fill: Callable[[BinaryIO, BinaryIO], None]


class ShardCache:
    """Shards that come when they are needed and go when others need their room.

    Args:
        folder: On a disk of this machine; made with its parents.
        max_bytes: What all shards may take together, those that are being written too.

    Raises:
        FeatureStoreError: If the folder cannot be made.
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
        """Open a shard; fetch it if it is not there.

        Args:
            slot: The shard.
            wait: Whether to wait for others that fetch it, and for room.

        Returns:
            The open file, which stays readable if the shard is removed meanwhile; None instead of waiting.

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
        for left in (part, scratch):  # by a process that was killed: its lock is ours now
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
                opened = part.open("rb")  # before it has its name, with which others may remove it
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
            except FileNotFoundError:  # a part that got its name, or was given up
                continue
            if entry.name.endswith((PART, SCRATCH)):
                free -= 0 if _removed_if_dead(Path(entry.path)) else status.st_size
            else:
                free -= status.st_size
                whole.append((status.st_mtime_ns, status.st_size, entry.path))
        if free + sum(size for _, size, _ in whole) < 0:
            return False  # what is being written takes all of it
        for _, size, path in sorted(whole):
            if free >= 0:
                break
            os.unlink(path)
            free += size
        return True

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        for store in os.scandir(self.folder):
            if store.name.endswith(STORE):  # whatever else is in the folder, stores of the user's too, is left alone
                for entry in os.scandir(store.path):
                    if entry.name.startswith("shard-") and not entry.name.endswith(LOCK):
                        yield entry


def _opened(slot: Slot) -> BinaryIO | None:
    try:
        file = slot.path.open("rb")
    except FileNotFoundError:
        return None
    if os.fstat(file.fileno()).st_size != slot.bytes:  # someone wrote into the cache: fetch it again
        file.close()
        return None
    os.utime(file.fileno())  # it was used last now
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
    """Hold a lock among processes and threads of this machine; gives whether it is held.

    Args:
        path: The lock's file; it stays.
        wait: Wait for it; otherwise it may not be held.
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
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing does not free it while a forked process has it open
    finally:
        os.close(descriptor)


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn an error of the cache's disk into one that says what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise FeatureStoreError(
            f"{path} cannot be written ({reason}): free space, lower data.init_args.stream.max_gb, or set "
            "data.init_args.stream.cache to a folder on another disk"
        ) from error
