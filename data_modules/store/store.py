"""The feature store: memory-mapped image features, looked up by image id.

A store is a folder::

    meta.json          rows, tokens, dim, extractor, size and checksum of every other file; written last
    ids.npy            (rows,) image ids as UTF-8 bytes, in row order
    order.npy          (rows,) int64, the row numbers sorted by id
    lengths.npy        (rows,) int32, only if rows differ in length: the original number of frames of each clip
    shard-00000.npy    (rows, tokens, dim) float16, and so on; other encodings: data_modules/store/encodings.py

Shards are plain NumPy files: the mapped bytes are the same as in an uncompressed Arrow file, and a gather is one
``take`` without decoding (tests/benchmarks/features.py). Opening a store reads ``meta.json`` only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_modules.store.encodings import PackedRows, encoding
from vlpet_lightning.checksums import checksum

VERSION = 1
META, IDS, ORDER, LENGTHS = "meta.json", "ids.npy", "order.npy", "lengths.npy"
SHOWN = 5  # ids listed in an error message


class FeatureStoreError(RuntimeError):
    """Raised for a feature store that cannot be used; the message names the file and the cure."""


class MissingFeatures(LookupError):
    """Raised for images without features, or without a file.

    Args:
        path: The store, or its URL, or the folder of the files.
        missing: Ids that are not in the store, in the order of the request.
        asked: Number of ids requested.
    """

    what = "features"
    cure = "Extract the features of these images (python -m vlpet_lightning data extract images)"

    def __init__(self, path: Path | str, missing: Sequence[str], asked: int) -> None:
        self.path = path
        self.missing = list(missing)
        self.asked = asked
        some = ", ".join(self.missing[:SHOWN]) + (", ..." if len(self.missing) > SHOWN else "")
        super().__init__(
            f"{len(self.missing)} of {asked} images have no {self.what} in {path}: {some}. {self.cure}, or take their "
            "questions out of the annotations"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.missing, self.asked)


class FeatureStore:
    """Read access to image features by row.

    Files are memory-mapped on first use, so a store can be pickled and sent to other processes.

    Args:
        path: The store's folder.

    Raises:
        FeatureStoreError: If the folder holds no complete store.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.meta = _read_meta(self.path)
        self.tokens = int(self.meta["tokens"])
        self.dim = int(self.meta["dim"])
        try:
            self.encoding = encoding(self.meta.get("encoding", "float16"))
        except ValueError as error:
            raise FeatureStoreError(f"{self.path} cannot be read ({error}): update this program") from error
        self._size = int(self.meta["rows"])
        counts = [shard["rows"] for shard in self.meta["shards"]]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._maps: dict[str, np.ndarray] = {}  # mapped index files
        self._shards: dict[int, np.ndarray | PackedRows] = {}

    def __len__(self) -> int:
        return self._size

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}, "_shards": {}}  # files are mapped again on first use

    @property
    def where(self) -> Path | str:
        """Location of the store, for messages."""
        return self.path

    @property
    def cure(self) -> str:
        """Advice on repairing a damaged file, for messages."""
        return CURE

    @property
    def ids(self) -> list[str]:
        """Image ids in row order."""
        return [id.decode() for id in self._map(IDS).tolist()]

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """Look up the rows of images.

        Args:
            ids: ``n`` image ids.

        Returns:
            ``(n,)`` int64 row numbers.

        Raises:
            MissingFeatures: If some are not in the store.
        """
        known, order = self._map(IDS), self._map(ORDER)
        wanted = np.array([id.encode() for id in ids], dtype=bytes)
        if not len(wanted):
            return np.empty(0, dtype=np.int64)
        # cast to the width of the known ids, because NumPy would copy all of them for another width; ids truncated
        # by the cast still fail the comparison below
        places = np.searchsorted(known, wanted.astype(known.dtype), sorter=order)
        found = np.asarray(order[np.minimum(places, self._size - 1)])
        absent = known[found] != wanted
        if absent.any():
            raise MissingFeatures(self.where, [id for id, gone in zip(ids, absent, strict=True) if gone], len(ids))
        return found

    def lengths(self, rows: np.ndarray) -> np.ndarray | None:
        """Number of vectors of images or clips before padding or pooling to ``tokens``.

        Args:
            rows: ``(n,)`` row numbers.

        Returns:
            ``(n,)`` int32, larger than ``tokens`` for pooled clips; None if the store records no lengths because all
            of its rows are full.
        """
        return np.asarray(self._map(LENGTHS)[rows]) if self.has_lengths else None

    def shards_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the shard number of each row."""
        return np.searchsorted(self._starts, rows, side="right") - 1

    def expect(self, shards: Sequence[int]) -> None:
        """Announce the shards that are read next, for stores that prefetch; does nothing here."""

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Gather the features of some rows.

        Args:
            rows: ``(n,)`` row numbers, in any order, with or without duplicates.

        Returns:
            ``(n, tokens, dim)`` float16.

        Raises:
            FeatureStoreError: If a shard is missing or damaged.
        """
        return self.encoding.decoded(torch.as_tensor(self.stored(rows))).numpy()

    def stored(self, rows: np.ndarray) -> np.ndarray:
        """Gather encoded rows, to be decoded by :attr:`encoding` here or on another device.

        Args:
            rows: ``(n,)`` row numbers.

        Returns:
            ``n`` encoded rows; ``(n, tokens, dim)`` float16 unless the encoding has another shape.

        Raises:
            FeatureStoreError: If a shard is missing or damaged.
        """
        rows = np.asarray(rows, dtype=np.int64)
        shards = self.shards_of(rows)
        opened = {shard: self._shard(shard) for shard in np.unique(shards).tolist()}
        first = next(iter(opened.values()), None)
        if len(opened) == 1 and isinstance(first, np.ndarray):
            return np.take(first, rows - self._starts[shards[0]], axis=0)
        found = np.empty((len(rows), *self.encoding.shape(self.tokens, self.dim)), dtype=self.encoding.dtype)
        for place, (shard, row) in enumerate(zip(shards.tolist(), (rows - self._starts[shards]).tolist(), strict=True)):
            try:
                found[place] = opened[shard][row]  # rows are large: the copy costs more than the loop
            except ValueError as error:
                raise self._damaged(shard, error) from error
        return found

    def _shard(self, number: int) -> np.ndarray | PackedRows:
        if number not in self._shards:
            entry = self.meta["shards"][number]
            path = self._checked(entry)
            try:
                with path.open("rb") as file:
                    self._shards[number] = self.encoding.open(file, entry["rows"], self.tokens, self.dim)
            except ValueError as error:
                raise self._damaged(number, error) from error
        return self._shards[number]

    def _damaged(self, number: int, error: ValueError) -> FeatureStoreError:
        return FeatureStoreError(f"{self.path / self.meta['shards'][number]['file']} is damaged ({error}): {self.cure}")

    def verify(self) -> Iterator[tuple[str, int]]:
        """Verify the checksum of every file.

        Yields:
            Name and size in bytes of each file, once it has been verified.

        Raises:
            FeatureStoreError: If a file is missing, truncated or changed; for a shard, the message lists its images.
        """
        for entry in self.files:
            self.verify_file(entry)
            yield entry["file"], entry["bytes"]

    @property
    def files(self) -> list[dict[str, Any]]:
        """Entries of ``meta.json`` for all files that must be present locally."""
        return [*self.meta["index"], *self.meta["shards"]]

    def verify_file(self, entry: dict[str, Any]) -> None:
        """Verify the checksum of one of ``files``.

        Raises:
            FeatureStoreError: If it is missing, truncated or changed; for a shard, the message lists its images.
        """
        path = self._checked(entry)
        if checksum(path) != entry["sha256"]:
            raise FeatureStoreError(f"{path} was changed since it was written{self._contents(entry)}: {self.cure}")

    def check_sizes(self) -> None:
        """Check the sizes of all ``files`` without reading them.

        Raises:
            FeatureStoreError: If one is missing or truncated; for a shard, the message lists its images.
        """
        for entry in self.files:
            self._checked(entry)

    def inspect(self, checksums: bool = False) -> Iterator[FeatureStoreError | None]:
        """Check each of ``files`` without stopping at the first error.

        Args:
            checksums: Read all files and verify their checksums; otherwise only their sizes are checked.

        Yields:
            The error of each file; None if it is intact.
        """
        for entry in self.files:
            try:
                self.verify_file(entry) if checksums else self._checked(entry)
            except FeatureStoreError as error:
                yield error
            else:
                yield None

    def ids_in(self, entry: dict[str, Any]) -> list[str]:
        """Return the ids of a shard, in row order; an empty list for other files."""
        shards = self.meta["shards"]
        if entry not in shards:
            return []
        start = int(self._starts[shards.index(entry)])
        return self.ids_between(start, start + entry["rows"])

    def ids_between(self, start: int, end: int) -> list[str]:
        """Return the ids of consecutive rows."""
        return [id.decode() for id in self._map(IDS)[start:end].tolist()]

    @property
    def has_lengths(self) -> bool:
        """Whether the store records the original length of each row, see :meth:`lengths`."""
        return any(entry["file"] == LENGTHS for entry in self.meta["index"])

    def _contents(self, entry: dict[str, Any]) -> str:
        try:
            ids = self.ids_in(entry)
        except FeatureStoreError:  # the file with the ids is damaged, too, and is reported separately
            return ""
        return f" (it holds {len(ids)} images: {', '.join(ids[:SHOWN])}, ...)" if ids else ""

    def _map(self, name: str) -> np.ndarray:
        if name not in self._maps:
            entry = next(e for e in self.files if e["file"] == name)
            path = self._checked(entry)
            try:
                mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            except ValueError as error:
                raise FeatureStoreError(f"{path} is not a NumPy file ({error}): {self.cure}") from error
            self._maps[name] = mapped
        return self._maps[name]

    def _checked(self, entry: dict[str, Any]) -> Path:
        path = self.path / entry["file"]
        if not path.is_file():
            raise FeatureStoreError(f"{path} is missing{self._contents(entry)}: {self.cure}")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise FeatureStoreError(
                f"{path} has {size:,} bytes instead of {entry['bytes']:,}: it was cut short or changed"
                f"{self._contents(entry) if entry['file'] != IDS else ''}; {self.cure}"
            )
        return path


CURE = "copy it again from its source, or make the store again"


def _read_meta(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise FeatureStoreError(
            f"no feature store at {path}: make one with\n"
            f"  python -m vlpet_lightning data extract images --source IMAGES --out {path}"
        )
    file = path / META
    if not file.is_file():
        raise FeatureStoreError(
            f"{file} is missing: the folder is no feature store, or writing it was cut short; make it again"
        )
    try:
        meta = json.loads(file.read_text())
        version = meta["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise FeatureStoreError(f"{file} cannot be read ({error!r}): {CURE}") from error
    if version != VERSION:
        raise FeatureStoreError(f"{path} has format {version}, this program reads format {VERSION}: make it again")
    problem = next(_problems(meta), None)
    if problem is not None:
        raise FeatureStoreError(f"{file} is damaged ({problem}): {CURE}")
    return meta


COUNTS = ("rows", "tokens", "dim")
FILE: dict[str, type] = {"file": str, "bytes": int}  # sha256 is optional: shards that are yet to be converted have none


def _problems(meta: dict[str, Any]) -> Iterator[str]:
    """Find fields of ``meta.json`` that are missing or differ from what ``writer.close_store`` writes."""
    parts: list[tuple[str, Any, dict[str, type]]] = [("", meta, dict.fromkeys(COUNTS, int) | {"extractor": dict})]
    for name, kinds in (("index", FILE), ("shards", FILE | {"rows": int})):
        if not isinstance(meta.get(name), list):
            yield f"{name} is {meta.get(name)!r}"
            return
        parts += [(f"{name}[{number}]", entry, kinds) for number, entry in enumerate(meta[name])]
    for where, content, kinds in parts:
        if not isinstance(content, dict):
            yield f"{where} is {content!r}"
            return
        for name, kind in kinds.items():
            value = content.get(name)
            if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
                yield f"{where}{'.' if where else ''}{name} is {value!r}"
                return
    rows = sum(shard["rows"] for shard in meta["shards"])
    if rows != meta["rows"]:
        yield f"rows is {meta['rows']}, its shards have {rows}"
