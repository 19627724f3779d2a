"""Reading from any URL that fsspec supports, with time-outs, checksums and retries."""

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
BLOCK = 2**20  # bytes that must arrive within the time-out
REQUEST = 8 * 2**20  # bytes per request, if the filesystem cannot stream a whole file
STREAMED = ("http", "https", "hf")  # one request per file, which works without range support, too
POLL = 0.2  # seconds until an abandoned reader thread notices
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
FINAL = (401, 403, 404, 410)  # HTTP statuses that are not retried
VERSION = (
    *("size", "ETag", "LastModified", "Last-Modified", "Content-MD5", "md5Hash", "generation", "mtime"),
    *("lfs", "blob_id"),  # Hugging Face Hub: of large files, of all files
)
CURE = "check the address and the network, then start the run again: it resumes from its last checkpoint"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retries:
    """Retry settings.

    Args:
        attempts: Maximum number of attempts.
        first_wait: Seconds to wait after the first failure; doubled after each further one, with a random factor
            between 0.5 and 1.
        timeout: Seconds without a byte after which an attempt counts as failed.
    """

    attempts: int = 5
    first_wait: float = 1.0
    timeout: float = 60.0


@dataclass(frozen=True)
class Remote:
    """A remote or local file or folder. It can be pickled: nothing stays open between two calls.

    Args:
        url: URL for fsspec, such as ``hf://``, ``s3://``, ``gs://``, ``https://`` or ``file://``, or a local path.
        retries: Retry settings.
        options: Storage options for fsspec.
    """

    url: str
    retries: Retries = field(default=Retries(), compare=False)
    options: dict[str, Any] = field(default_factory=dict, compare=False)

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url.rstrip('/')}/{name}", self.retries, self.options)

    def read(self) -> bytes | None:
        """Read a small file; None if it does not exist or access is denied.

        Raises:
            FeatureStoreError: If it cannot be read.
        """
        return self.retry(self.read_once)

    def read_once(self) -> bytes | None:
        """Make one attempt of :meth:`read`, for use with :meth:`retry`."""
        return _unless_absent(lambda: b"".join(self._blocks()))

    def info(self) -> dict[str, Any] | None:
        """Return the filesystem's information on a file; None if it does not exist or access is denied.

        Raises:
            FeatureStoreError: If it does not answer.
        """
        return self.retry(lambda: _unless_absent(lambda: self.watched(lambda fs, path: dict(fs.info(path)))))

    def find(self) -> dict[str, dict[str, Any]]:
        """Return information on all files below a folder, by name; empty if the filesystem cannot list files.

        Raises:
            FeatureStoreError: If it does not answer.
        """
        listed = self.retry(lambda: _unless_absent(lambda: self.watched(_listed)))
        return listed or {}

    def save(self, file: BinaryIO, *, size: int | None = None, sha256: str | None = None) -> None:
        """Copy to an open file, and retry until size and checksum match.

        Raises:
            FeatureStoreError: If no attempt succeeds.
            OSError: If the disk is full.
        """
        self.retry(lambda: self.copy(file, size=size, sha256=sha256))

    def copy(
        self, file: BinaryIO, *, size: int | None = None, sha256: str | None = None, crc: int | None = None
    ) -> None:
        """Make one attempt of :meth:`save`, for use with :meth:`retry`.

        Raises:
            OSError: If the transfer fails, or size or checksum do not match.
        """
        digest, count, sum32 = hashlib.sha256(), 0, 0
        file.seek(0)
        for block in self._blocks():
            count += file.write(block)
            if size is not None and count > size:  # no more space is reserved
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
        """Call a function until it succeeds; each failure that is retried is logged.

        Raises:
            FeatureStoreError: If all attempts fail, or one fails with an error that retrying cannot fix.
            OSError: If the local disk is full.
        """
        attempts, wait = self.retries.attempts, self.retries.first_wait
        for attempt in range(1, attempts + 1):
            try:
                return once()
            except Exception as error:  # anything that remote filesystems, the network and decoders raise
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
        """Return ``work(filesystem, path)``; raises ``TimeoutError`` if it takes longer than the time-out."""
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
        """Protocol of the URL; ``file`` for a path."""
        return self.url.partition("://")[0] if "://" in self.url else "file"

    def _opened(self) -> tuple[Any, str]:
        # created for each call: fsspec caches one per process, which does not work after a fork
        defaults: dict[str, Any] = {}
        seconds = self.retries.timeout
        if self.protocol in ("http", "https"):
            from aiohttp import ClientTimeout  # its default is 5 minutes per file, however fast the transfer

            limits = ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
            defaults = {"client_kwargs": {"timeout": limits}}
        if self.protocol in ("s3", "s3a"):
            defaults = {"config_kwargs": {"connect_timeout": seconds, "read_timeout": seconds}}
        return fsspec.core.url_to_fs(self.url, **(defaults | self.options))


def version_of(info: dict[str, Any]) -> dict[str, str]:
    """Select the fields of a filesystem's file information that identify a version of the file."""
    return {name: str(info[name]) for name in VERSION if info.get(name) is not None}


def _listed(filesystem: Any, path: str) -> dict[str, dict[str, Any]]:
    found = filesystem.find(path, detail=True)
    start = len(path.rstrip("/")) + 1
    return {name[start:]: dict(info) for name, info in found.items()}


def _from_thread(make: Callable[[], Iterator[T]], timeout: float) -> Iterator[T]:
    """Iterate in a separate thread and abandon it on time-out, so that a hanging filesystem cannot block."""
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
        # object stores report a missing object as forbidden if listing is not allowed
        if isinstance(error, FileNotFoundError | PermissionError) or getattr(error, "status", None) in FINAL:
            return None
        raise error


def _true(error: Exception) -> Exception:
    """Recover the network error behind fsspec's "not found", which it raises for any failed size request over HTTP."""
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
