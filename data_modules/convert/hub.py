"""``data convert hub``: single-pass conversion of VL-Adapter's published parquet features to feature stores.

Layout (ylsung/VL-Adapter-datasets; tools/convert_zip_to_hf.py of ylsung/VL_adapter writes it)::

    features/DATASET/data_clip_RN101_att/part-00000.parquet    id, features (49, 2048) half; 4,096 rows; zstd
    annotations/...
    manifest.json.gz                                           data_modules/convert/manifest.py

Each parquet file becomes one shard. It has one row group with one large column, so it is decoded in small batches
whose values are read in place: ``column.flatten().flatten().to_numpy()``. ``as_py()`` would create one Python object
per number.
"""

from __future__ import annotations

import posixpath
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
from rich.console import Console

from data_modules.convert.manifest import FETCH, NAME, REPOSITORY, VARIANT, Manifest, chosen, crc_of, read_manifest
from data_modules.store.extras import need
from data_modules.store.pooling import are_finite, pool_rows
from data_modules.store.resumable import AGAIN, Part, ResumableStore, Rows, fill, writing
from data_modules.store.store import FeatureStoreError
from vlpet_lightning.atomic_file import atomic_write

TOKENS, DIM = 49, 2048
BATCH = 32  # rows per decoded batch: 6 MB, which fit into CPU caches
BUFFER = 8 * 2**20  # read-ahead buffer of a remote file
SHOWN = 5
RECORD = {"model": "RN101", "pretrained": "openai", "image_size": 224, "dataset": REPOSITORY, "variant": VARIANT}


class HubSource:
    """A folder in the published layout, local or at any URL that fsspec supports.

    Args:
        url: A folder, ``hf://datasets/OWNER/NAME[@REVISION]``, ``s3://...``, and so on.

    Raises:
        FeatureStoreError: If there is no such folder, or it holds no features in this layout.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
            self.files = self._find("features") | self._find("annotations")
            names = sorted(name for name in self.files if name.endswith(".parquet"))
            manifest = self.fs.exists(self.path(NAME))
        except Exception as error:  # anything that remote filesystems and the network raise
            raise FeatureStoreError(f"{url} cannot be read ({error}): check the address and the network") from error
        self.shards: dict[str, list[str]] = {}
        for name in names:
            parts = name.split("/")
            if len(parts) == 4 and parts[2] == VARIANT:
                self.shards.setdefault(parts[1], []).append(name)
        if not self.shards:
            raise FeatureStoreError(
                f"no features/DATASET/{VARIANT}/part-*.parquet in {url}: give --source the folder that "
                f"`data download` filled, or hf://datasets/{REPOSITORY}"
            )
        self.manifest = self._manifest() if manifest else None

    @property
    def is_local(self) -> bool:
        """Whether its files are local and can be memory-mapped."""
        return "file" in ((self.fs.protocol,) if isinstance(self.fs.protocol, str) else self.fs.protocol)

    def path(self, name: str) -> str:
        """Return the path of a file in the filesystem."""
        return posixpath.join(self.root, name)

    def check(self, datasets: list[str]) -> None:
        """Check that all shards of the manifest are present.

        Raises:
            FeatureStoreError: If some are missing.
        """
        for dataset in datasets if self.manifest is not None else []:
            wanted = self.manifest.shards_of(dataset)  # type: ignore[union-attr]
            missing = sorted(set(wanted) - set(self.shards[dataset]))
            if missing:
                some = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
                raise FeatureStoreError(
                    f"{len(missing)} of {len(wanted)} shards are not in {self.url}: {some}; {FETCH}"
                )

    def part(self, name: str, pool: int | None) -> Part:
        """Return a parquet file as a part to convert, after checking its schema and number of rows."""
        expected = None if self.manifest is None else self.manifest.shards.get(name)
        with self._open(name) as file:
            rows = file.metadata.num_rows
            self._check_schema(name, file.schema_arrow)
        if expected is not None and rows != len(expected):
            self._refuse(name, f"has {rows} rows, the manifest says {len(expected)}")
        return Part(name, self.files[name], rows, lambda: self._read(name, pool, expected))

    def blocks(self, name: str) -> Iterator[bytes]:
        """Read a file in blocks of bytes."""
        try:
            with self.fs.open(self.path(name), "rb") as file:
                while block := file.read(BUFFER):
                    yield block
        except Exception as error:
            raise FeatureStoreError(f"{self.path(name)} cannot be read ({error}): {FETCH}, {AGAIN}") from error

    def _find(self, folder: str) -> dict[str, int]:
        try:
            found = self.fs.find(self.path(folder), detail=True)
        except FileNotFoundError:
            return {}
        start = len(self.root.rstrip("/")) + 1
        return {path[start:]: int(info["size"]) for path, info in found.items()}

    def _manifest(self) -> Manifest:
        with self.fs.open(self.path(NAME), "rb") as file:
            return read_manifest(file, self.path(NAME))

    def _open(self, name: str) -> Any:
        import pyarrow.parquet as pq

        checks = {"page_checksum_verification": True}
        try:
            if self.is_local:
                return pq.ParquetFile(self.path(name), memory_map=True, **checks)
            return pq.ParquetFile(self.fs.open(self.path(name), "rb"), buffer_size=BUFFER, **checks)
        except Exception as error:  # anything that pyarrow, remote filesystems and the network raise
            raise self._damaged(name, error) from error

    def _read(self, name: str, pool: int | None, expected: list[str] | None) -> Iterator[Rows]:
        allowed = None if expected is None else set(expected)
        with self._open(name) as file:
            batches = file.iter_batches(batch_size=BATCH, columns=["id", "features"], use_threads=False)
            while True:
                try:
                    batch = next(batches, None)
                except Exception as error:
                    raise self._damaged(name, error) from error
                if batch is None:
                    return
                yield self._rows(name, batch, pool, allowed)

    def _rows(self, name: str, batch: Any, pool: int | None, allowed: set[str] | None) -> Rows:
        ids, column = batch.column("id"), batch.column("features")
        values = column.flatten().flatten()
        if ids.null_count or len(values) != len(ids) * TOKENS * DIM or values.null_count:
            self._refuse(name, "has empty cells")
        names = ids.to_pylist()
        strange = [] if allowed is None else [id for id in names if id not in allowed]
        if strange:
            self._refuse(name, f"holds ids that the manifest has not there: {', '.join(strange[:SHOWN])}")
        features = values.to_numpy().reshape(len(names), TOKENS, DIM)
        finite = are_finite(features)
        if not finite.all():
            bad = [id for id, good in zip(names, finite, strict=True) if not good]
            self._refuse(name, f"has features that are not finite, of {', '.join(bad[:SHOWN])}")
        return Rows(names, pool_rows(features, pool))

    def _check_schema(self, name: str, schema: Any) -> None:
        import pyarrow as pa

        wanted = {"id": pa.string(), "features": pa.list_(pa.list_(pa.float16(), DIM), TOKENS)}
        for column, kind in wanted.items():
            if column not in schema.names:
                self._refuse(name, f"has no column {column!r}, only {', '.join(schema.names)}")
            found = schema.field(column).type
            if not _same_type(found, kind):
                self._refuse(name, f"has {column} of type {found} instead of {kind}")

    def _refuse(self, name: str, problem: str) -> None:
        raise FeatureStoreError(f"{self.path(name)} {problem}: {FETCH}")

    def _damaged(self, name: str, error: Exception) -> FeatureStoreError:
        reason = " ".join(str(error).split())
        return FeatureStoreError(f"{self.path(name)} is damaged or was cut short ({reason}): {FETCH}, {AGAIN}")


def _same_type(found: Any, wanted: Any) -> bool:
    import pyarrow as pa

    if not pa.types.is_fixed_size_list(wanted):
        return bool(found == wanted)
    if not pa.types.is_fixed_size_list(found) or found.list_size != wanted.list_size:
        return False
    return _same_type(found.value_type, wanted.value_type)  # names of list items are ignored


def copy_annotations(source: HubSource, out: Path) -> int:
    """Copy all annotation files unchanged to ``out/annotations``; returns the number of files copied.

    Raises:
        FeatureStoreError: If a file does not match the manifest.
    """
    manifest = source.manifest or Manifest()
    written = 0
    for name in sorted(name for name in source.files if name.startswith("annotations/")):
        path = out / name
        if _is_there(path, source, name, manifest):
            continue
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                problem = manifest.problem(name, *_copy(source.blocks(name), file))
                if problem is not None:
                    raise FeatureStoreError(f"{source.path(name)} {problem}: {FETCH}")
        written += 1
    return written


def _is_there(path: Path, source: HubSource, name: str, manifest: Manifest) -> bool:
    if not path.is_file():
        return False
    found = (path.stat().st_size, crc_of(_blocks(path)))
    if name in manifest.files:
        return found == manifest.files[name]
    return found == (source.files[name], crc_of(source.blocks(name)))


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BUFFER):
            yield block


def _copy(blocks: Iterator[bytes], file: BinaryIO) -> tuple[int, int]:
    """Write blocks and return their size and CRC-32."""
    size = crc = 0
    for block in blocks:
        file.write(block)
        size += len(block)
        crc = zlib.crc32(block, crc)
    return size, crc


def convert_hub(
    *,
    source: str,
    out: Path,
    datasets: str | None = None,
    pool: int | None = 6,
    rows: str = "float16",
    workers: int = 2,
) -> None:
    """Convert the published features of VL-Adapter into feature stores, and copy its annotations.

    Resumes an interrupted attempt: finished parquet files are not read again.

    Args:
        source: Folder or URL in the published layout, such as hf://datasets/ylsung/VL-Adapter-datasets.
        out: Data root for features/DATASET and annotations.
        datasets: Comma-separated names out of COCO, GQA, VG, nlvr; by default all that the source has.
        pool: Side of the grid that the 7x7 features are max-pooled to; null keeps 49 vectors.
        rows: float16; uint8, half the size with the error given in docs/data.md; zstd or lz4, lossless compression.
        workers: Number of parquet files converted in parallel; each takes up to 0.4 GB of memory.

    Raises:
        FeatureStoreError: If the source is damaged or not in this layout, if OUT holds other stores, or the disk is
            full.
        ValueError: If a data set is unknown, or features cannot be pooled to this grid.
        ModuleNotFoundError: If pyarrow is not installed.
    """
    need("pyarrow")
    pooled = pool_rows(np.zeros((1, TOKENS, 1), dtype=np.float16), pool).shape[1]
    hub = HubSource(source)
    names = chosen(datasets, hub.shards)
    hub.check(names)
    console = Console()
    stores = {}
    for name in names:  # check all of them before anything is written
        parts = [hub.part(shard, pool) for shard in hub.shards[name]]
        path, record = out / "features" / name, {**RECORD, "pool": pool}
        stores[name] = ResumableStore(path, parts, tokens=pooled, dim=DIM, extractor=record, rows=rows)
    complete = {name: store.complete for name, store in stores.items()}
    copied = copy_annotations(hub, out)
    fill(list(stores.values()), workers=workers)
    for name, store in stores.items():
        state = "up to date" if complete[name] else "written"
        count = sum(part.rows for part in store.parts)
        console.print(f"{state}: {store.path} ({count:,} images, {pooled} tokens of {DIM})", soft_wrap=True)
    console.print(f"annotations: {copied} files copied to {out / 'annotations'}", soft_wrap=True)
    if hub.manifest is None:
        console.print(f"{source} has no {NAME}: annotations and ids could not be compared with it", soft_wrap=True)
