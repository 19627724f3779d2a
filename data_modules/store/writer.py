"""Crash-safe writing of feature stores: an interrupted store is never taken for a complete one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from data_modules.store.store import IDS, LENGTHS, META, ORDER, VERSION, FeatureStoreError
from vlpet_lightning.atomic_file import atomic_write
from vlpet_lightning.checksums import checksum

SHARD_BYTES = 256 * 2**20


class FeatureWriter:
    """Row-by-row writer of a store, used as a context manager.

    All files are written atomically and ``meta.json`` last: a folder without it is not a store. Leftovers of an
    earlier attempt are overwritten.

    Args:
        path: The store's folder; created with its parents.
        tokens: Number of feature vectors per image.
        dim: Width of a vector.
        shard_bytes: Size at which a shard is written; also the memory needed.
        extractor: Description of the extractor, for ``meta.json``.

    Raises:
        FeatureStoreError: If the folder already holds a complete store.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        tokens: int,
        dim: int,
        shard_bytes: int = SHARD_BYTES,
        extractor: dict[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        if (self.path / META).exists():
            raise FeatureStoreError(f"{self.path} is a complete feature store already: remove it to make it again")
        self.path.mkdir(parents=True, exist_ok=True)
        self.tokens = tokens
        self.dim = dim
        self.shard_rows = max(1, shard_bytes // (tokens * dim * 2))
        self.extractor = extractor or {}
        self._ids: list[str] = []
        self._known: set[str] = set()
        self._pending: list[np.ndarray] = []
        self._pending_rows = 0
        self._shards: list[dict[str, Any]] = []

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._close()

    def add(self, ids: Sequence[str], features: np.ndarray) -> None:
        """Append images.

        Args:
            ids: ``n`` ids that are not in the store yet.
            features: ``(n, tokens, dim)``, stored as float16.

        Raises:
            ValueError: If the shape is wrong, a value is not finite in float16, or an id is duplicated.
        """
        if features.shape != (len(ids), self.tokens, self.dim):
            raise ValueError(
                f"features of {len(ids)} images have shape {features.shape}: expected "
                f"{(len(ids), self.tokens, self.dim)}"
            )
        twice = sorted({id for id in ids if id in self._known}) or ([] if len(set(ids)) == len(ids) else sorted(ids))
        if twice:
            raise ValueError(f"image ids come twice: {', '.join(twice[:5])}")
        rows = features.astype(np.float16)
        if not np.isfinite(rows).all():
            bad = [id for id, row in zip(ids, rows, strict=True) if not np.isfinite(row).all()]
            raise ValueError(f"features of {len(bad)} images are not finite in float16: {', '.join(bad[:5])}")
        self._known.update(ids)
        self._ids.extend(ids)
        while len(rows):
            room = self.shard_rows - self._pending_rows
            self._pending.append(rows[:room])
            self._pending_rows += len(rows[:room])
            rows = rows[room:]
            if self._pending_rows == self.shard_rows:
                self._write_shard()

    def _write_shard(self) -> None:
        rows = np.concatenate(self._pending)
        self._pending, self._pending_rows = [], 0
        entry = save_array(self.path / f"shard-{len(self._shards):05d}.npy", rows)
        self._shards.append({**entry, "rows": len(rows)})

    def _close(self) -> None:
        if not self._ids:
            raise ValueError(f"no image was added to {self.path}: there is nothing to write")
        if self._pending:
            self._write_shard()
        close_store(
            self.path, ids=self._ids, tokens=self.tokens, dim=self.dim, extractor=self.extractor, shards=self._shards
        )


def close_store(
    path: Path,
    *,
    ids: Sequence[str],
    tokens: int,
    dim: int,
    extractor: dict[str, Any],
    shards: Sequence[dict[str, Any]],
    lengths: np.ndarray | None = None,
    sources: Sequence[dict[str, Any]] | None = None,
    encoding: str = "float16",
) -> None:
    """Write the index of existing shards and then ``meta.json``, which completes the store.

    Args:
        path: The store's folder.
        ids: Image ids of all rows, in row order.
        tokens: Number of feature vectors per image.
        dim: Width of a vector.
        extractor: Description of the extractor.
        shards: Name, size, checksum and number of rows of each shard.
        lengths: ``(rows,)`` number of vectors before padding, if rows differ in length.
        sources: Names and sizes of the converted files.
        encoding: Row encoding, one of :data:`data_modules.store.encodings.ENCODINGS`.
    """
    names = np.array([id.encode() for id in ids], dtype=bytes)
    index = [
        save_array(path / IDS, names),
        save_array(path / ORDER, np.argsort(names, kind="stable").astype(np.int64)),
    ]
    if lengths is not None:
        index.append(save_array(path / LENGTHS, lengths.astype(np.int32)))
    meta = {
        "version": VERSION,
        "rows": len(ids),
        "tokens": tokens,
        "dim": dim,
        "dtype": "float16",
        **({} if encoding == "float16" else {"encoding": encoding}),
        "extractor": extractor,
        **({} if sources is None else {"sources": list(sources)}),
        "index": index,
        "shards": list(shards),
    }
    save_json(path / META, meta)


def save_array(path: Path, array: np.ndarray) -> dict[str, Any]:
    """Write an array atomically and return its entry for ``meta.json``."""
    with atomic_write(path) as file:
        np.save(file, array, allow_pickle=False)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": checksum(path)}


def save_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
