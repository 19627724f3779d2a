"""Feature stores whose shards are fetched when they are needed, from any URL, into a bounded cache on this machine."""

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

_stores: WeakSet[StreamedStore] = WeakSet()  # of this process


@dataclass(frozen=True)
class Stream:
    """How features are streamed.

    Args:
        cache: Folder on this machine's disk for shards, shared by all processes and runs that name it; by default
            ``vlpet_lightning/shards`` below ``$SLURM_TMPDIR``, ``$XDG_CACHE_HOME`` or ``~/.cache``, the first there is.
        max_gb: What shards may take there, in GB; a small index of every store comes beside it.
        pool: Side of the grid that published 7x7 features are max-pooled to; null keeps 49 vectors.
        attempts: How often something is read before the run is stopped.
        first_wait: Seconds after the first failure; they double with each.
        timeout: Seconds without a byte after which an attempt counts as failed.
        threads: Shards that each process fetches ahead at the same time; 0 fetches nothing ahead.
        options: Storage options for fsspec, such as an endpoint. They are saved with the run: leave credentials in the
            environment.

    Raises:
        ValueError: If a number makes no sense.
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
        """Where the cache lies."""
        if self.cache is not None:
            return Path(self.cache).expanduser()
        node = os.environ.get("SLURM_TMPDIR")  # the node's own disk, where homes tend to be on the network
        return (Path(node) / "vlpet_lightning" if node else cache_home()) / "shards"

    @property
    def max_bytes(self) -> int:
        """Bound of the cache in bytes."""
        return int(self.max_gb * 1e9)

    def remote(self, url: str) -> Remote:
        """Something at a URL, read as patiently as is said here."""
        return Remote(url, Retries(self.attempts, self.first_wait, self.timeout), self.options or {})

    @cached_property
    def prefetcher(self) -> Prefetcher:
        """What fetches ahead for all stores of this process."""
        return Prefetcher(self.threads)


class StreamedStore(FeatureStore):
    """A feature store whose index lies in a cache, and whose shards come there when they are gathered.

    What is gathered is the same as from a store that was converted or copied before, bit for bit.

    Args:
        source: Where shards come from.
        stream: The cache, and how patiently is read.

    Raises:
        FeatureStoreError: If the source cannot be read, or a shard is larger than the cache.
    """

    def __init__(self, source: Source, stream: Stream) -> None:
        self.source = source
        self.cache = ShardCache(stream.folder, stream.max_bytes)
        self.prefetcher = stream.prefetcher
        super().__init__(prepared(source, stream.folder))
        self._paths = [str(self.path / entry["file"]) for entry in self.meta["shards"]]
        self._inodes: dict[int, int] = {}  # of mapped shards
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
        """Those that are here all the time: the index."""
        return list(self.meta["index"])

    @property
    def where(self) -> Path | str:
        """Its address, not the cache's folder."""
        return self.source.url

    @property
    def cure(self) -> str:
        """What lies in the cache is a copy."""
        return f"remove {self.path}, and it is fetched again"

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _inodes={})
        _stores.add(self)

    def expect(self, shards: Sequence[int]) -> None:
        """Fetch shards in the background, the first ones first, instead of those expected before."""
        missing = [number for number in shards if not self._is_there(number, used=True)]
        self.prefetcher.want(self._fetch_ahead, str(self.path), missing)

    def _fetch_ahead(self, number: int) -> None:
        file = self.cache.open(self._slot(number), wait=False)
        if file is not None:
            file.close()

    def _shard(self, number: int) -> np.ndarray | PackedRows:
        if number not in self._shards or not self._is_there(number, used=True):
            rows = self.meta["shards"][number]["rows"]
            with self.cache.open(self._slot(number)) as file:  # others may have removed its name by now
                try:
                    mapped = self._shards[number] = self.encoding.open(file, rows, self.tokens, self.dim)
                except ValueError as error:
                    raise self._damaged(number, error) from error
                self._inodes[number] = os.fstat(file.fileno()).st_ino
            for store in list(_stores):  # what made room for it is still on the disk while it is mapped
                for other in [other for other in store._shards if not store._is_there(other)]:
                    del store._shards[other], store._inodes[other]
            return mapped
        return self._shards[number]

    def _is_there(self, number: int, *, used: bool = False) -> bool:
        """Whether a shard is in the cache, the same file if it is mapped; notes there if it is used."""
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
    """A store at a URL.

    Args:
        features: Folder with our stores, or in the published layout, or its ``features``.
        name: The store.
        stream: The cache, and how patiently is read.

    Raises:
        FeatureStoreError: If there is none, it cannot be read, or a shard is larger than the cache.
        ModuleNotFoundError: If parquet files are to be read and pyarrow is not installed.
        ValueError: If features cannot be pooled so.
    """
    return StreamedStore(find_source(stream.remote(features), name, stream.pool), stream)
