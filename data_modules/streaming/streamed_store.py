"""Streamed feature stores: shards are fetched on demand from any URL into a bounded local cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO
from weakref import WeakSet

import numpy as np

from data_modules.store.cache_home import cache_home
from data_modules.store.encodings import PackedRows
from data_modules.store.store import FeatureStore, FeatureStoreError
from data_modules.streaming.cache import ShardCache, Slot
from data_modules.streaming.fetch import Remote, Retries
from data_modules.streaming.prefetch import Prefetcher
from data_modules.streaming.sources import Source, find_source, prepared

_stores: WeakSet[StreamedStore] = WeakSet()  # open stores of this process


@dataclass(frozen=True)
class Stream:
    """Streaming settings.

    Args:
        cache: Folder for shards on a local disk, shared by all processes and runs that use it; by default
            ``vlpet_lightning/shards`` below ``$SLURM_TMPDIR``, ``$XDG_CACHE_HOME`` or ``~/.cache``, in this order.
        max_gb: Maximum size of the cached shards, in GB; the small index of every store is not counted.
        pool: Side of the grid that published 7x7 features are max-pooled to; null keeps 49 vectors.
        attempts: Number of attempts to read a file before the run stops.
        first_wait: Seconds to wait after the first failure; doubled after each further one.
        timeout: Seconds without a byte after which an attempt counts as failed.
        threads: Number of shards that each process prefetches in parallel; 0 turns prefetching off.
        options: Storage options for fsspec, such as an endpoint. They are saved with the run, so leave credentials in
            the environment.

    Raises:
        ValueError: If a number is out of range.
    """

    cache: str | None = None
    max_gb: float = 50.0
    pool: int | None = 6
    attempts: int = 5
    first_wait: float = 1.0
    timeout: float = 60.0
    threads: int = 2
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        limits = {"max_gb": 0.0, "attempts": 1, "first_wait": 0, "timeout": 0.0, "threads": 0}
        for name, least in limits.items():
            value = getattr(self, name)
            if value < least or (isinstance(least, float) and value == 0):
                wanted = "more than 0" if isinstance(least, float) else f"{least} or more"
                raise ValueError(f"stream.{name} must be {wanted}, got {value}")

    @property
    def folder(self) -> Path:
        """Folder of the cache."""
        if self.cache is not None:
            return Path(self.cache).expanduser()
        node = os.environ.get("SLURM_TMPDIR")  # the node's local disk; home folders are often on the network
        return (Path(node) / "vlpet_lightning" if node else cache_home()) / "shards"

    @property
    def max_bytes(self) -> int:
        """Maximum size of the cache, in bytes."""
        return int(self.max_gb * 1e9)

    def remote(self, url: str) -> Remote:
        """Return a file or folder at a URL, with these retries and options."""
        return Remote(url, Retries(self.attempts, self.first_wait, self.timeout), self.options or {})

    @cached_property
    def prefetcher(self) -> Prefetcher:
        """Prefetcher shared by all stores of this process."""
        return Prefetcher(self.threads)


class StreamedStore(FeatureStore):
    """A feature store with its index in a local cache and its shards fetched there on demand.

    Gathered features equal those of a converted or copied store, bit for bit.

    Args:
        source: Source of the shards.
        stream: Cache and retry settings.

    Raises:
        FeatureStoreError: If the source cannot be read, or a shard is larger than the cache.
    """

    def __init__(self, source: Source, stream: Stream) -> None:
        self.source = source
        self.cache = ShardCache(stream.folder, stream.max_bytes)
        self.prefetcher = stream.prefetcher
        super().__init__(prepared(source, stream.folder))
        self._paths = [str(self.path / entry["file"]) for entry in self.meta["shards"]]
        self._inodes: dict[int, int] = {}  # inodes of the mapped shards
        _stores.add(self)
        entries = self.meta["shards"]
        self.shard_bytes = max(entry["bytes"] for entry in entries)
        self.scratch_bytes = max(entry.get("scratch_bytes", 0) for entry in entries)
        if self.shard_bytes + self.scratch_bytes > stream.max_bytes:
            needed = (self.shard_bytes + self.scratch_bytes) / 1e9
            raise FeatureStoreError(
                f"a shard of {self.source.url} needs {needed:,.3f} GB, the cache {stream.folder} may have "
                f"{stream.max_gb:,.3f}: raise data.init_args.stream.max_gb"
            )

    @property
    def files(self) -> list[dict[str, Any]]:
        """Files that are always present locally: the index."""
        return list(self.meta["index"])

    @property
    def where(self) -> Path | str:
        """URL of the source, for messages."""
        return self.source.url

    @property
    def cure(self) -> str:
        """Advice on repairing a damaged file: the cache is a copy, so removing it is safe."""
        return f"remove {self.path}, and it is fetched again"

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _inodes={})
        _stores.add(self)

    def expect(self, shards: Sequence[int]) -> None:
        """Prefetch shards in the given order; replaces the previous request."""
        missing = [number for number in shards if not self._is_there(number, used=True)]
        self.prefetcher.want(self._fetch_ahead, str(self.path), missing)

    def _fetch_ahead(self, number: int) -> None:
        file = self.cache.open(self._slot(number), wait=False)
        if file is not None:
            file.close()

    def _shard(self, number: int) -> np.ndarray | PackedRows:
        if number not in self._shards or not self._is_there(number, used=True):
            rows = self.meta["shards"][number]["rows"]
            with self.cache.open(self._slot(number)) as file:  # the file may be unlinked by now
                try:
                    mapped = self._shards[number] = self.encoding.open(file, rows, self.tokens, self.dim)
                except ValueError as error:
                    raise self._damaged(number, error) from error
                self._inodes[number] = os.fstat(file.fileno()).st_ino
            for store in list(_stores):  # evicted shards use disk space until they are unmapped
                for other in [other for other in store._shards if not store._is_there(other)]:
                    del store._shards[other], store._inodes[other]
            return mapped
        return self._shards[number]

    def _is_there(self, number: int, *, used: bool = False) -> bool:
        """Whether the cache holds a shard (the same file, if it is mapped); ``used`` updates its time of use."""
        try:
            if used:
                os.utime(self._paths[number])
            found = os.stat(self._paths[number]).st_ino
        except FileNotFoundError:
            return False
        return self._inodes.get(number, found) == found

    def _slot(self, number: int) -> Slot:
        entry = self.meta["shards"][number]
        start = int(self._starts[number])

        def fill(file: BinaryIO, scratch: BinaryIO) -> None:
            self.source.fill(entry, self.ids_between(start, start + entry["rows"]), file, scratch)

        return Slot(self.path / entry["file"], entry["bytes"], lambda: self.source.scratch(entry), fill)


def open_stream(features: str, name: str, stream: Stream) -> StreamedStore:
    """Open a store at a URL.

    Args:
        features: Folder of stores, folder in the published layout, or the ``features`` folder of one.
        name: Name of the store.
        stream: Cache and retry settings.

    Raises:
        FeatureStoreError: If there is no such store, it cannot be read, or a shard is larger than the cache.
        ModuleNotFoundError: If the source holds parquet files and pyarrow is not installed.
        ValueError: If features cannot be pooled to this grid.
    """
    return StreamedStore(find_source(stream.remote(features), name, stream.pool), stream)
