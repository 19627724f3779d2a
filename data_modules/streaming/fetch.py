"""Reading at any URL that fsspec opens: what stops, is cut short or has wrong bytes is tried again, then refused."""

from __future__ import annotations

import errno
import hashlib
import logging
import random
import time
import zlib
from asyncio import TimeoutError as AsyncTimeout
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, BinaryIO, TypeVar

import fsspec

from data_modules.store.store import FeatureStoreError

T = TypeVar("T")
BLOCK = 2**20  # what must arrive within the time-out
REQUEST = 8 * 2**20  # asked of a filesystem at once, where it cannot stream a whole file
STREAMED = ("http", "https", "hf")  # one request a file; also servers that know no ranges
POLL = 0.2  # seconds until a reader sees that it was given up
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
FINAL = (401, 403, 404, 410)  # statuses of HTTP that another attempt does not change
VERSION = (
    *("size", "ETag", "LastModified", "Last-Modified", "Content-MD5", "md5Hash", "generation", "mtime"),
    *("lfs", "blob_id"),  # the Hub's: of large files, of all files
)
CURE = "check the address and the network, then start the run again: it goes on from its last checkpoint"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retries:
    """How often and how patiently something is read.

    Args:
        attempts: Before giving up.
        first_wait: Seconds after the first failure; they double with each, and half of them are left to chance.
        timeout: Seconds without a byte after which an attempt counts as failed.
    """

    attempts: int = 5
    first_wait: float = 1.0
    timeout: float = 60.0


@dataclass(frozen=True)
class Remote:
    """A file or folder at a URL, or here. It can be handed to other processes: nothing is open between two calls.

    Args:
        url: As fsspec takes it: ``hf://``, ``s3://``, ``gs://``, ``https://``, ``file://``, or a local path.
        retries: How often it is tried.
        options: Storage options for fsspec.
    """

    url: str
    retries: Retries = field(default=Retries(), compare=False)
    options: dict[str, Any] = field(default_factory=dict, compare=False)

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url.rstrip('/')}/{name}", self.retries, self.options)

    def read(self) -> bytes | None:
        """A small file's content; None if there is none, or none that may be read.

        Raises:
            FeatureStoreError: If it cannot be read.
        """
        return self.retry(self.read_once)

    def read_once(self) -> bytes | None:
        """One attempt of :meth:`read`, to be used within :meth:`retry`."""
        return _unless_absent(lambda: b"".join(self._blocks()))

    def info(self) -> dict[str, Any] | None:
        """What the filesystem says of a file; None if there is none, or none that may be read.

        Raises:
            FeatureStoreError: If it does not answer.
        """
        return self.retry(lambda: _unless_absent(lambda: self.watched(lambda fs, path: dict(fs.info(path)))))

    def find(self) -> dict[str, dict[str, Any]]:
        """All files below a folder with what the filesystem says of each; none where it cannot list.

        Raises:
            FeatureStoreError: If it does not answer.
        """
        listed = self.retry(lambda: _unless_absent(lambda: self.watched(_listed)))
        return listed or {}

    def save(self, file: BinaryIO, *, size: int | None = None, sha256: str | None = None) -> None:
        """Copy to an open file, again and again until size and checksum are right.

        Raises:
            FeatureStoreError: If they never were.
            OSError: If the disk is full.
        """
        self.retry(lambda: self.copy(file, size=size, sha256=sha256))

    def copy(
        self, file: BinaryIO, *, size: int | None = None, sha256: str | None = None, crc: int | None = None
    ) -> None:
        """One attempt of :meth:`save`, to be used within :meth:`retry`.

        Raises:
            OSError: If it stops, or is not of the size or checksum that was said.
        """
        digest, count, sum32 = hashlib.sha256(), 0, 0
        file.seek(0)
        for block in self._blocks():
            count += file.write(block)
            if size is not None and count > size:  # the cache has no room for more
                break
            if sha256 is not None:
                digest.update(block)
            if crc is not None:
                sum32 = zlib.crc32(block, sum32)
        file.truncate()
        file.flush()
        if size is not None and count != size:
            raise OSError(f"{count:,} bytes arrived instead of {size:,}")
        if sha256 is not None and digest.hexdigest() != sha256:
            raise OSError(f"its SHA-256 is {digest.hexdigest()[:12]}... instead of {sha256[:12]}...")
        if crc is not None and sum32 != crc:
            raise OSError(f"its CRC-32 is {sum32:08x} instead of {crc:08x}")

    def retry(self, once: Callable[[], T]) -> T:
        """Call until it succeeds; each failure that is followed by another attempt is logged.

        Raises:
            FeatureStoreError: If no attempt succeeded, or the first one said that others would not.
            OSError: If the local disk is full.
        """
        attempts, wait = self.retries.attempts, self.retries.first_wait
        for attempt in range(1, attempts + 1):
            try:
                return once()
            except Exception as error:  # whatever a remote filesystem, the network and a decoder raise
                if isinstance(error, OSError) and error.errno in DISK:
                    raise
                failed = _true(error)
            reason = _reason(failed)
            if _is_final(failed):
                raise FeatureStoreError(f"{self.url} cannot be read ({reason}): {_cure(failed)}") from failed
            if attempt < attempts:
                pause = wait * 2 ** (attempt - 1) * (0.5 + random.random() / 2)
                log.warning(
                    "%s: attempt %d of %d failed (%s), the next in %.1f s", self.url, attempt, attempts, reason, pause
                )
                time.sleep(pause)
        raise FeatureStoreError(
            f"{self.url} could not be read in {attempts} attempts; the last one: {reason}. Nothing was skipped: {CURE}"
        ) from failed

    def watched(self, work: Callable[[Any, str], T]) -> T:
        """What ``work(filesystem, path)`` gives, if it does within the time-out."""
        return next(_from_thread(lambda: iter([work(*self._opened())]), self.retries.timeout))

    def _blocks(self) -> Iterator[bytes]:
        return _from_thread(self._read_blocks, self.retries.timeout)

    def _read_blocks(self) -> Iterator[bytes]:
        filesystem, path = self._opened()
        request = 0 if self.protocol in STREAMED else REQUEST
        with filesystem.open(path, "rb", block_size=request) as file:
            while block := file.read(BLOCK):
                yield block

    @property
    def protocol(self) -> str:
        """What the URL begins with; ``file`` for a path."""
        return self.url.partition("://")[0] if "://" in self.url else "file"

    def _opened(self) -> tuple[Any, str]:
        # made anew for each call: fsspec keeps one for each process, and none works in a forked one
        defaults: dict[str, Any] = {}
        seconds = self.retries.timeout
        if self.protocol in ("http", "https"):
            from aiohttp import ClientTimeout  # its own limit is 5 minutes a file, however fast that comes

            limits = ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
            defaults = {"client_kwargs": {"timeout": limits}}
        if self.protocol in ("s3", "s3a"):
            defaults = {"config_kwargs": {"connect_timeout": seconds, "read_timeout": seconds}}
        return fsspec.core.url_to_fs(self.url, **(defaults | self.options))


def version_of(info: dict[str, Any]) -> dict[str, str]:
    """What tells one version of a file from another, of what a filesystem says."""
    return {name: str(info[name]) for name in VERSION if info.get(name) is not None}


def _listed(filesystem: Any, path: str) -> dict[str, dict[str, Any]]:
    found = filesystem.find(path, detail=True)
    start = len(path.rstrip("/")) + 1
    return {name[start:]: dict(info) for name, info in found.items()}


def _from_thread(make: Callable[[], Iterator[T]], timeout: float) -> Iterator[T]:
    """Iterate in a thread of its own that is left behind when it gives nothing in time: no filesystem can hang."""
    pipe: Queue[tuple[bool, Any]] = Queue(maxsize=2)
    given_up = Event()

    def put(more: bool, item: Any) -> None:
        while not given_up.is_set():
            try:
                return pipe.put((more, item), timeout=POLL)
            except Full:
                continue

    def run() -> None:
        try:
            for item in make():
                put(True, item)
                if given_up.is_set():
                    return
            put(False, None)
        except BaseException as error:
            put(False, error)

    Thread(target=run, daemon=True).start()
    try:
        while True:
            try:
                more, item = pipe.get(timeout=timeout)
            except Empty:
                raise TimeoutError(f"nothing arrived for {timeout:g} s") from None
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        given_up.set()


def _unless_absent(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except Exception as error:
        error = _true(error)
        # object stores say that an object is forbidden where it is not there and they may not be listed
        if isinstance(error, FileNotFoundError | PermissionError) or getattr(error, "status", None) in FINAL:
            return None
        raise error


def _true(error: Exception) -> Exception:
    """What happened: fsspec calls whatever goes wrong when it asks a web server for a file's size "not found"."""
    cause = error.__cause__
    network = isinstance(cause, ConnectionError | TimeoutError | AsyncTimeout) or "aiohttp" in type(cause).__module__
    return cause if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) and network else error


def _is_final(error: Exception) -> bool:
    if isinstance(error, FileNotFoundError | PermissionError | ImportError):
        return True
    return getattr(error, "status", None) in FINAL or "Protocol not known" in str(error)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    if isinstance(error, FeatureStoreError | TimeoutError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _cure(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "install what it names beside vlpet-lightning"
    if isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403):
        return "check the address, and the credentials that fsspec finds in the environment"
    return "check the address"
