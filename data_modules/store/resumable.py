"""Resumable stores, written part by part: for the conversion of large sources.

Until it is complete, a store also holds ``unfinished.json`` (settings and list of parts) and, for each finished part,
``shard-N.json`` (entry, ids and lengths). A part counts as finished when this file exists; it is written after the
shard. If the source has unreadable files, these records are retained, so that the parts concerned can be rewritten
once their files are repaired.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from data_modules.store.encodings import encoding
from data_modules.store.store import META, FeatureStore, FeatureStoreError
from data_modules.store.writer import close_store, save_json
from vlpet_lightning.atomic_file import atomic_write
from vlpet_lightning.folder_lock import FolderNotWritable, clear_abandoned, locked_folder

STATE = "unfinished.json"
AGAIN = "then give the same command again: it resumes where it stopped"


class Rows(NamedTuple):
    """Rows of a part: ``n`` ids, ``(n, tokens, dim)`` float16, and ``(n,)`` lengths if rows differ in length."""

    ids: list[str]
    features: np.ndarray
    lengths: np.ndarray | None = None


@dataclass(frozen=True)
class Part:
    """A part of the source that becomes one shard.

    Args:
        name: Shown in errors; like ``bytes``, it must not change between attempts.
        bytes: Size of the source; None if it may change because files are repaired.
        rows: Number of rows.
        read: Reads the rows in order.
    """

    name: str
    bytes: int | None
    rows: int
    read: Callable[[], Iterable[Rows]]


class ResumableStore:
    """Writer of a store from parts, each written once, in any order and from several threads.

    Args:
        path: The store's folder; created with its parents.
        parts: All parts, in row order.
        tokens: Number of feature vectors per row.
        dim: Width of a vector.
        extractor: Description of the extractor, for ``meta.json``.
        rows: Row encoding, one of :data:`data_modules.store.encodings.ENCODINGS`.
        repaired: Given the record of an unreadable file, whether the file has changed since; its part is then
            rewritten.

    Raises:
        FeatureStoreError: If the folder holds another store, complete or unfinished.
        ValueError: If there is no such encoding.
    """

    def __init__(
        self,
        path: Path,
        parts: Sequence[Part],
        *,
        tokens: int,
        dim: int,
        extractor: dict[str, Any],
        rows: str = "float16",
        repaired: Callable[[dict[str, Any]], bool] = lambda record: False,
    ) -> None:
        self.path = path
        self.encoding = encoding(rows)
        self.parts = list(parts)
        self.tokens = tokens
        self.dim = dim
        self.extractor = extractor
        self.sources = [{"name": part.name, "bytes": part.bytes, "rows": part.rows} for part in parts]
        self.repaired = repaired
        self._lock = threading.Lock()
        self.look()

    def look(self) -> None:
        """Read from the folder which parts are finished.

        Raises:
            FeatureStoreError: If the folder holds another store, or the beginning of another one.
        """
        self.complete = self._is_complete()
        self._owner: dict[str, int] = {}
        self.finished = self._finished()
        again = [n for n, record in self.finished.items() if any(map(self.repaired, record.get("skipped", [])))]
        for number in again:
            del self.finished[number]
        self.complete = self.complete and not again
        self._owner = {id: n for id, n in self._owner.items() if n not in again}

    @property
    def todo(self) -> list[int]:
        """Numbers of the unfinished parts."""
        return [] if self.complete else [n for n in range(len(self.parts)) if n not in self.finished]

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """Records of the unreadable files, in row order."""
        return [entry for _, record in sorted(self.finished.items()) for entry in record.get("skipped", [])]

    @property
    def bytes_to_write(self) -> int:
        """Maximum disk space that the unfinished parts need."""
        return sum(self.parts[number].rows for number in self.todo) * self.encoding.row_bytes(self.tokens, self.dim)

    def begin(self) -> None:
        """Create the folder and record the settings and parts in it."""
        if not self.complete:
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                save_json(self.path / STATE, self._state())
                (self.path / META).unlink(missing_ok=True)  # a complete store of which parts are rewritten
                for number in self.todo:
                    (self.path / f"shard-{number:05d}.json").unlink(missing_ok=True)

    def write(
        self,
        number: int,
        wrote: Callable[[int], object] = lambda rows: None,
        *,
        part: Part | None = None,
        skipped: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Write the shard of a part.

        Args:
            number: Number of the part.
            wrote: Progress callback, called with the number of rows of each piece.
            part: Replacement of the part without its unreadable files.
            skipped: Records of these files.

        Raises:
            FeatureStoreError: If the number of rows is not as declared, an id is duplicated, or the disk is full.
        """
        part = part or self.parts[number]
        path = self.path / f"shard-{number:05d}{self.encoding.suffix}"
        digest, ids, lengths = hashlib.sha256(), list[str](), list[int]()

        def pieces() -> Iterator[np.ndarray]:
            for rows in part.read():
                self._claim(rows.ids, number)
                yield rows.features
                ids.extend(rows.ids)
                lengths.extend([] if rows.lengths is None else rows.lengths.tolist())
                wrote(len(rows.ids))

        with writing(path), atomic_write(path) as file:
            for block in self.encoding.packed((part.rows, self.tokens, self.dim), pieces()):
                digest.update(block)
                file.write(block)
            count = len(ids)
            if count != part.rows:
                raise FeatureStoreError(f"{part.name} has {count} rows instead of {part.rows}: fetch it again, {AGAIN}")
        entry = {"file": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest(), "rows": count}
        record = {"entry": entry, "ids": ids, "lengths": lengths, **({"skipped": list(skipped)} if skipped else {})}
        with writing(path):
            save_json(path.with_suffix(".json"), record)
        with self._lock:
            self.finished[number] = record

    def close(self) -> None:
        """Complete the store: write the index and ``meta.json``, and remove the files needed to resume."""
        if not self.complete:
            records = [self.finished[number] for number in range(len(self.parts))]
            lengths = [length for record in records for length in record["lengths"]]
            with writing(self.path):
                close_store(
                    self.path,
                    ids=[id for record in records for id in record["ids"]],
                    tokens=self.tokens,
                    dim=self.dim,
                    extractor=self.extractor,
                    shards=[record["entry"] for record in records],
                    lengths=np.array(lengths) if lengths else None,
                    sources=self.sources,
                    encoding=self.encoding.name,
                )
        kept = [] if self.skipped else [*self.path.glob("shard-*.json"), self.path / STATE]
        for left in [*self.path.glob("*.part"), *kept]:
            left.unlink(missing_ok=True)

    def _claim(self, ids: Sequence[str], number: int) -> None:
        with self._lock:
            for id in ids:
                owner = self._owner.get(id)
                if owner is not None:
                    names = sorted({self.parts[owner].name, self.parts[number].name})
                    raise FeatureStoreError(
                        f"id {id!r} comes twice, in {' and in '.join(names)}: fetch the source again, or remove one"
                    )
                self._owner[id] = number

    def _state(self) -> dict[str, Any]:
        state = {"tokens": self.tokens, "dim": self.dim, "extractor": self.extractor, "sources": self.sources}
        return state if self.encoding.name == "float16" else {**state, "encoding": self.encoding.name}

    def _is_complete(self) -> bool:
        if not (self.path / META).exists():
            return False
        meta = FeatureStore(self.path).meta
        same = all(_timeless(meta.get(name)) == _timeless(value) for name, value in self._state().items())
        if same and meta.get("encoding", "float16") == self.encoding.name:
            self._remember_versions(meta["extractor"])
            return True
        raise FeatureStoreError(
            f"{self.path} is a complete store of {meta['rows']} rows, made from another source or in another way "
            f"({meta['extractor']}): choose another --out, or remove it to make it again"
        )

    def _finished(self) -> dict[int, dict[str, Any]]:
        state = self.path / STATE
        if not state.is_file():
            return {}
        try:
            begun = json.loads(state.read_text())
            same = {k: _timeless(v) for k, v in begun.items()} == {k: _timeless(v) for k, v in self._state().items()}
        except (ValueError, AttributeError):
            same = False
        if not same:
            raise FeatureStoreError(
                f"{self.path} holds the beginning of a store from another source or with other options: give the "
                "same ones as before, or remove it"
            )
        self._remember_versions(begun["extractor"])
        found = {}
        for number, part in enumerate(self.parts):
            record = _read_record(self.path / f"shard-{number:05d}.json", part.rows)
            if record is not None:
                self._claim(record["ids"], number)
                found[number] = record
        return found

    def _remember_versions(self, begun: dict[str, Any]) -> None:
        """Record the library versions of all attempts: newer ones than before may write the remaining parts."""
        before, now = begun.get("versions"), self.extractor.get("versions")
        if before is not None and now is not None and before != now:
            known = before.split("; ")
            self.extractor = {**self.extractor, "versions": "; ".join([*known, *([] if now in known else [now])])}


def _timeless(value: Any) -> Any:
    return {k: v for k, v in value.items() if k != "versions"} if isinstance(value, dict) else value


def _read_record(path: Path, rows: int) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text())
        entry = record["entry"]
        count = len(record["ids"]) + len(record.get("skipped", []))
        whole = path.with_name(entry["file"]).stat().st_size == entry["bytes"] and count == rows
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole else None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert disk errors into a :class:`FeatureStoreError` that names the cure."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise FeatureStoreError(f"{path} cannot be written ({reason}): free space or change --out, {AGAIN}") from error


@contextmanager
def only_writer(stores: Sequence[ResumableStore]) -> Iterator[None]:
    """Hold the locks of all stores that are not complete, and read their state again once they are held.

    Raises:
        FolderInUse: If another process writes one of them; names host, process and since when.
        FeatureStoreError: If a folder cannot be written.
    """
    with ExitStack() as locks:
        for store in stores:
            if store.complete:
                clear_abandoned(store.path)
            else:
                try:
                    locks.enter_context(locked_folder(store.path, "the store", "choose another --out"))
                except FolderNotWritable as error:
                    raise FeatureStoreError(
                        f"{store.path} cannot be written ({error.__cause__}): free space or change --out, {AGAIN}"
                    ) from error
                store.look()
        yield


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f} rows/s")


def columns() -> list[ProgressColumn]:
    """Columns of a progress bar that counts rows."""
    return [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn()]


def fill(stores: Sequence[ResumableStore], *, workers: int) -> None:
    """Write all unfinished parts of some stores, then close each store.

    Args:
        stores: Stores on one disk.
        workers: Number of parts written in parallel.

    Raises:
        FeatureStoreError: If the disk has too little free space (checked before anything is written), or a part
            cannot be read or written. Finished parts are preserved.
        FolderInUse: If another process writes one of the stores.
        ValueError: If ``workers`` is not positive.
    """
    if workers < 1:
        raise ValueError(f"workers must be 1 or more, got {workers}")
    for store in stores:
        check_space(store.path, sum(s.bytes_to_write for s in stores))
    with only_writer(stores), Progress(*columns()) as progress:
        for store in stores:
            store.begin()
            total = sum(part.rows for part in store.parts)
            left = sum(store.parts[number].rows for number in store.todo)
            bar = progress.add_task(store.path.name, total=total, completed=total - left)
            _write_all(store, workers, lambda rows, bar=bar: progress.advance(bar, rows))  # type: ignore[misc]
            store.close()


def _write_all(store: ResumableStore, workers: int, wrote: Callable[[int], object]) -> None:
    stop = threading.Event()

    def told(rows: int) -> None:
        if stop.is_set():
            raise _Stopped
        wrote(rows)

    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(store.write, number, told) for number in store.todo]
        try:
            wait(jobs, return_when=FIRST_EXCEPTION)
        finally:  # after Ctrl-C, too
            stop.set()
            for job in jobs:
                job.cancel()
    for job in jobs:
        if not job.cancelled() and job.exception() is not None and not isinstance(job.exception(), _Stopped):
            job.result()


class _Stopped(Exception):
    pass


def check_space(path: Path, needed: int) -> None:
    """Check that a disk has enough free space.

    Raises:
        FeatureStoreError: If it does not.
    """
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise FeatureStoreError(
            f"{path} needs {needed / 1e9:,.1f} GB more, and {free / 1e9:,.1f} GB are free: make room, or take "
            "another --out"
        )
