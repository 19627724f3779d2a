"""Lock that lets one process at a time write to a folder, on local disks and network file systems.

The lock is a file in the folder that names its owner. The owner refreshes the file's modification time every
:data:`HEARTBEAT` seconds and removes the file at the end. An owner killed on this machine is replaced at once. On
another machine only the heartbeat is visible: the owner is considered dead after :data:`STALE` seconds without one.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any

from rich.console import Console

from vlpet_lightning.run.signals import before_leaving

NAME = "owner.json"
HEARTBEAT = 10.0  # seconds
STALE = 60.0  # seconds
POLL = 1.0  # seconds


class FolderInUse(RuntimeError):
    """Another process writes to the folder."""


class FolderNotWritable(OSError):
    """The folder cannot be written."""


def _start_of(pid: int) -> str | None:
    """Return the start time of a process in clock ticks since boot; None if it does not exist or has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _machine() -> str:
    """Identify this boot of this machine and the process namespace, within which process ids are comparable."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


class FolderLock:
    """Lock of one folder.

    Args:
        folder: The folder; created if it does not exist.
        purpose: The folder's role in error messages, e.g. ``the run``.
        cure: Advice that ends the error message, besides waiting for the other process.
    """

    def __init__(self, folder: Path, purpose: str, cure: str) -> None:
        self.folder = folder
        self.path = folder / NAME
        self.purpose = purpose
        self.cure = cure
        self.token = secrets.token_hex(8)
        self._made: list[Path] = []
        self._stop = Event()
        self._thread: Thread | None = None

    def acquire(self) -> None:
        """Acquire the lock; wait up to :data:`STALE` seconds for an owner on another machine that may be dead.

        Raises:
            FolderInUse: If another process owns the folder; names its host, process id and start time.
            FolderNotWritable: If the folder cannot be created or written.
        """
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._claim()
        except OSError as error:
            self._remove_made()
            raise FolderNotWritable(
                f"{self.purpose} cannot write to {self.folder} ({error.strerror or error}): make it writable for this "
                f"user, or {self.cure}"
            ) from error
        except FolderInUse:
            self._remove_made()
            raise
        self._thread = Thread(target=self._beat, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Release the lock and remove folders that were created for it and are still empty."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with suppress(OSError):
            if self._owner().get("token") == self.token:
                self.path.unlink()
        self._remove_made()

    def clear(self) -> None:
        """Remove the lock of an owner that was killed; keep any other."""
        with suppress(OSError):
            owner = self._owner()
            if owner and self._is_dead(owner):
                self.path.unlink()

    def _remove_made(self) -> None:
        with suppress(OSError):
            for path in self._made:
                path.rmdir()

    def _claim(self) -> None:
        seen: int | None = None
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                with suppress(OSError):  # some network file systems lack flock; the check below still applies
                    fcntl.flock(file, fcntl.LOCK_EX)
                # a release between open and flock has unlinked this file: retry
                if not self._is_current(file):
                    continue
                owner = self._owner()
                if not owner or self._is_dead(owner):
                    self._write(file)
                    break
            finally:
                os.close(file)
            seen = self._wait_for(owner, seen)
        if self._owner().get("token") != self.token:
            raise self._in_use(self._owner())

    def _is_current(self, file: int) -> bool:
        try:
            return os.fstat(file).st_ino == self.path.stat().st_ino
        except FileNotFoundError:
            return False

    def _write(self, file: int) -> None:
        pid = os.getpid()
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        owner = {"host": socket.gethostname(), "pid": pid, "since": since, "token": self.token}
        content = json.dumps(owner | {"machine": _machine(), "start": _start_of(pid)}) + "\n"
        os.ftruncate(file, 0)
        os.pwrite(file, content.encode(), 0)
        os.fsync(file)

    def _owner(self) -> dict[str, Any]:
        """Return the owner's record; empty if there is none, or a kill left it incomplete."""
        try:
            found = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _is_dead(self, owner: dict[str, Any]) -> bool:
        if owner.get("machine") == _machine():
            pid = owner.get("pid")
            return not isinstance(pid, int) or _start_of(pid) != owner.get("start")
        return self._age() > STALE

    def _wait_for(self, owner: dict[str, Any], seen: int | None) -> int:
        """Wait one polling interval for a heartbeat of an owner on another machine.

        Args:
            owner: Record of the owner.
            seen: Time of the first heartbeat seen.

        Returns:
            Time of the first heartbeat seen.

        Raises:
            FolderInUse: If the owner is alive.
        """
        with suppress(FileNotFoundError):
            beat = self.path.stat().st_mtime_ns
            if owner.get("machine") == _machine() or (seen is not None and beat != seen):
                raise self._in_use(owner)
            if seen is None:
                Console(stderr=True).print(
                    f"{self.folder} belongs to {self._described(owner)}: waiting up to {STALE:.0f} s for a heartbeat",
                    soft_wrap=True,
                    markup=False,
                    highlight=False,
                )
                seen = beat
        time.sleep(POLL)
        return seen or 0

    def _age(self) -> float:
        """Return the seconds since the last heartbeat, by the file system's clock."""
        probe = self.folder / f".{NAME}.{self.token}"
        probe.touch()
        try:
            return probe.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)

    @staticmethod
    def _described(owner: dict[str, Any]) -> str:
        return f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}"

    def _in_use(self, owner: dict[str, Any]) -> FolderInUse:
        return FolderInUse(
            f"{self.folder} is being written by {self._described(owner)}: wait until it has ended, or {self.cure}"
        )

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            with suppress(OSError):  # a temporary outage of the file server is no reason to end
                if self._owner().get("token") not in (self.token, None):
                    text = f"{self.folder} was taken over by {self._described(self._owner())}: this process ends\n"
                    os.write(2, text.encode())
                    os._exit(1)  # suspended for longer than STALE: anything written now would mix two runs
                os.utime(self.path)


def clear_abandoned(folder: Path) -> None:
    """Remove the lock of a killed process from a folder; does nothing if the folder is not writable."""
    FolderLock(folder, "", "").clear()


@contextmanager
def locked_folder(folder: Path, purpose: str, cure: str) -> Iterator[None]:
    """Hold a folder's lock; see :class:`FolderLock`."""
    lock = FolderLock(folder, purpose, cure)
    lock.acquire()
    before_leaving.append(lock.release)
    try:
        yield
    finally:
        before_leaving.remove(lock.release)
        lock.release()
