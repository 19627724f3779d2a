"""Sources of streamed shards: feature stores or published parquet files, at any URL.

A source writes the index of a store (everything but the shards) to the cache, and then single shards on demand. The
name of the cache folder depends on the source's content, so that a changed source never reuses outdated shards.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from data_modules.convert.hub import DIM, RECORD, TOKENS, HubSource
from data_modules.convert.manifest import FETCH, NAME, VARIANT, Manifest, read_manifest
from data_modules.store.encodings import npy_header
from data_modules.store.extras import need
from data_modules.store.pooling import pool_rows
from data_modules.store.store import META, SHOWN, FeatureStoreError
from data_modules.store.writer import close_store
from data_modules.streaming.cache import STORE, disk, locked
from data_modules.streaming.fetch import Remote, version_of
from vlpet_lightning.atomic_file import atomic_write


class Source(Protocol):
    """Interface of a source of shards."""

    @property
    def url(self) -> str:
        """URL, for messages."""

    @property
    def folder(self) -> str:
        """Name of the store's folder in the cache; changes with the content."""

    def write_index(self, folder: Path) -> None:
        """Write everything but the shards, ``meta.json`` last."""

    def scratch(self, entry: dict[str, Any]) -> int:
        """Temporary space in bytes that :meth:`fill` needs in addition to the shard."""

    def fill(self, entry: dict[str, Any], ids: list[str], file: BinaryIO, scratch: BinaryIO) -> None:
        """Write a shard.

        Args:
            entry: Its entry in ``meta.json``.
            ids: Ids of its rows.
            file: File to write the shard to.
            scratch: Temporary file, removed afterwards.

        Raises:
            FeatureStoreError: If it cannot be fetched.
        """


@dataclass(frozen=True)
class StoreSource:
    """A feature store in this project's format.

    Args:
        remote: Its folder.
        meta: Content of its ``meta.json``.
    """

    remote: Remote
    meta: bytes

    @property
    def url(self) -> str:
        return self.remote.url

    @property
    def folder(self) -> str:
        return f"{Path(self.url).name}-{hashlib.sha256(self.meta).hexdigest()[:16]}"

    def write_index(self, folder: Path) -> None:
        try:
            meta = json.loads(self.meta)
            index = [(entry["file"], entry["bytes"], entry["sha256"]) for entry in meta["index"]]
            names = [name for name, _, _ in index] + [entry["file"] for entry in meta["shards"]]
        except (ValueError, KeyError, TypeError) as error:
            raise FeatureStoreError(f"{self.url}/{META} cannot be read ({error!r}): make the store again") from error
        strange = [name for name in names if not re.fullmatch(r"(shard-\d+|ids|order|lengths)\.\w+", name)]
        if strange:  # a path could point outside of the cache
            raise FeatureStoreError(f"{self.url}/{META} has files of other names than a store's: {strange[:SHOWN]}")
        for name, size, sha256 in index:
            with atomic_write(folder / name) as file:
                (self.remote / name).save(file, size=size, sha256=sha256)
        with atomic_write(folder / META) as file:
            file.write(self.meta)

    def scratch(self, entry: dict[str, Any]) -> int:
        return 0

    def fill(self, entry: dict[str, Any], ids: list[str], file: BinaryIO, scratch: BinaryIO) -> None:
        (self.remote / entry["file"]).save(file, size=entry["bytes"], sha256=entry["sha256"])


@dataclass(frozen=True)
class ParquetSource:
    """The published features of one data set, with the same rows as the store that ``data convert hub`` writes.

    Rows are in manifest order; without a manifest, in file order.

    Args:
        remote: The folder that contains ``features``.
        dataset: The data set.
        pool: Side of the grid that features are max-pooled to; None keeps all vectors.
        listed: File information by name, as listed by the filesystem; empty if it cannot list files.
    """

    remote: Remote
    dataset: str
    pool: int | None
    listed: dict[str, dict[str, Any]]

    @property
    def url(self) -> str:
        return f"{self.remote.url.rstrip('/')}/features/{self.dataset}"

    @property
    def folder(self) -> str:
        versions = {name: version_of(info) for name, info in sorted(self.listed.items())}
        if not versions:
            versions = {NAME: version_of((self.remote / NAME).info() or {})}
        content = json.dumps([self.remote.url, self.dataset, self.pool, versions])
        return f"{self.dataset}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"

    def write_index(self, folder: Path) -> None:
        tokens = pool_rows(np.zeros((1, TOKENS, 1), dtype=np.float16), self.pool).shape[1]
        shards, ids = [], list[str]()
        for number, (name, names) in enumerate(self._contents().items()):
            size = len(npy_header(np.dtype("<f2"), (len(names), tokens, DIM))) + len(names) * tokens * DIM * 2
            entry = {"file": f"shard-{number:05d}.npy", "bytes": size, "rows": len(names), "source": name}
            info = self.listed.get(name, {})
            lfs = info.get("lfs") or {}
            known = {"source_bytes": info.get("size"), "source_sha256": lfs.get("sha256")}
            # not the file size, which some filesystems do not report: windows must not depend on the filesystem
            shards.append({**entry, **known, "scratch_bytes": len(names) * TOKENS * DIM * 2})
            ids += names
        if len(set(ids)) != len(ids):
            raise FeatureStoreError(f"ids come twice in {self.url}: {FETCH}")
        record = {**RECORD, "pool": self.pool}
        close_store(folder, ids=ids, tokens=tokens, dim=DIM, extractor=record, shards=shards)

    def scratch(self, entry: dict[str, Any]) -> int:
        size = entry["source_bytes"]
        return int((size if size is not None else ((self.remote / entry["source"]).info() or {}).get("size")) or 0)

    def fill(self, entry: dict[str, Any], ids: list[str], file: BinaryIO, scratch: BinaryIO) -> None:
        remote = self.remote / entry["source"]

        def once() -> None:
            remote.copy(scratch, size=entry["source_bytes"], sha256=entry["source_sha256"])
            _decode(Path(scratch.name), entry["source"], ids, self.pool, file)

        remote.retry(once)

    def _contents(self) -> dict[str, list[str]]:
        manifest = manifest_at(self.remote)
        if manifest is None:
            return {name: _ids_of(self.remote / name) for name in sorted(self.listed)}
        names = manifest.shards_of(self.dataset)
        missing = [name for name in names if self.listed and name not in self.listed]
        if missing:
            some = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
            raise FeatureStoreError(
                f"{len(missing)} of {len(names)} shards are not in {self.remote.url}: {some}; {FETCH}"
            )
        return {name: manifest.shards[name] for name in names}


class _Fetched(HubSource):
    """A published shard in a local file of any name."""

    def __init__(self, file: Path, name: str, ids: list[str]) -> None:
        self.url = str(file)
        self.file = file
        self.fs = LocalFileSystem()
        self.files = {name: file.stat().st_size}
        self.manifest = Manifest(shards={name: ids})

    def path(self, name: str) -> str:
        return str(self.file)


def _decode(parquet: Path, name: str, ids: list[str], pool: int | None, file: BinaryIO) -> None:
    places = {id: place for place, id in enumerate(ids)}
    done = np.zeros(len(ids), dtype=bool)
    try:
        for rows in _Fetched(parquet, name, ids).part(name, pool).read():
            numbers = np.array([places[id] for id in rows.ids])
            if not done.any():
                header = npy_header(np.dtype("<f2"), (len(ids), *rows.features.shape[1:]))
                file.seek(0)
                file.write(header)
            for number, row in zip(numbers.tolist(), rows.features, strict=True):
                file.seek(len(header) + number * row.nbytes)
                file.write(np.ascontiguousarray(row).data.cast("B"))
            done[numbers] = True
    except FeatureStoreError as error:
        raise FeatureStoreError(str(error).split(f": {FETCH}")[0].replace(str(parquet), "it")) from error
    if not done.all():
        lacking = [id for id, there in zip(ids, done, strict=True) if not there]
        raise FeatureStoreError(f"it lacks {len(lacking)} ids of the manifest: {', '.join(lacking[:SHOWN])}")


def _ids_of(remote: Remote) -> list[str]:
    import pyarrow.parquet as pq

    def read(filesystem: Any, path: str) -> list[str]:
        with filesystem.open(path, "rb") as file:
            return pq.ParquetFile(file).read(columns=["id"]).column("id").to_pylist()

    return remote.retry(lambda: remote.watched(read))


@lru_cache(maxsize=1)
def manifest_at(remote: Remote) -> Manifest | None:
    """Read the manifest of a folder in the published layout; None if it has none.

    Raises:
        FeatureStoreError: If it is damaged or cannot be read.
    """

    def once() -> Manifest | None:
        content = (remote / NAME).read_once()
        return None if content is None else read_manifest(BytesIO(content), f"{remote.url}/{NAME}")

    return remote.retry(once)


def find_source(features: Remote, name: str, pool: int | None) -> Source:
    """Find the source of a store's shards.

    Args:
        features: Folder of stores, folder in the published layout, or the ``features`` folder of one.
        name: Name of the store.
        pool: Side of the pooled grid, for the published layout.

    Raises:
        FeatureStoreError: If no source is found, or it cannot be read.
        ModuleNotFoundError: If the source holds parquet files and pyarrow is not installed.
        ValueError: If features cannot be pooled to this grid.
    """
    above, _, last = features.url.rstrip("/").rpartition("/")
    root = Remote(above, features.retries, features.options) if last == "features" else features
    for folder in dict.fromkeys((features / name, root / "features" / name)):
        meta = (folder / META).read()
        if meta is not None:
            return StoreSource(folder, meta)
    below = f"features/{name}/{VARIANT}"
    found = (root / below).find()
    listed = {f"{below}/{file}": info for file, info in found.items() if file.endswith(".parquet")}
    manifest = None if listed else manifest_at(root)
    if not listed and (manifest is None or not manifest.shards_of(name)):
        raise FeatureStoreError(
            f"no features of {name} at {features.url}: neither {name}/{META} of a feature store nor {below}/*.parquet "
            "of the published layout can be read there; check data.init_args.features, and that reading is allowed"
        )
    need("pyarrow")
    pool_rows(np.zeros((1, TOKENS, 1), dtype=np.float16), pool)  # raises if the grid is too large
    return ParquetSource(root, name, pool, listed)


def prepared(source: Source, cache: Path) -> Path:
    """Return the store's folder in a cache, with its index; one process writes the index while others wait."""
    folder = cache / f"{source.folder}{STORE}"
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(cache / f"{folder.name}.lock"):
            if not (folder / META).is_file():
                source.write_index(folder)
    return folder
