"""Speed of converting the published features, compared with ``as_py()``: ``python -m tests.benchmarks.convert [rows]``.

Rows are random with three quarters of zeros, as after a ReLU; shards are compressed like the published ones.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from data_modules.convert.hub import BATCH, DIM, TOKENS, convert_hub
from data_modules.store.pooling import pool_rows
from data_modules.store.writer import FeatureWriter

SHARDS = 4
LEVEL = 9  # zstd level, tools/convert_zip_to_hf.py of ylsung/VL_adapter
FULL = 4096  # rows per published shard


def shard(root: Path, number: int, rows: int, level: int | None = LEVEL, repeat: int = 1) -> Path:
    """Write a parquet file in the published layout."""
    rng = np.random.default_rng(number)
    values = rng.standard_normal((rows, TOKENS * DIM), dtype=np.float32)
    kept = np.tile(np.maximum(values - 0.7, 0).astype(np.float16), (repeat, 1))
    inner = pa.FixedSizeListArray.from_arrays(pa.array(kept.reshape(-1), type=pa.float16()), DIM)
    ids = [f"COCO_train2014_{number:03d}{row:09d}" for row in range(len(kept))]
    table = pa.table({"id": ids, "features": pa.FixedSizeListArray.from_arrays(inner, TOKENS)})
    path = root / "features" / "COCO" / "data_clip_RN101_att" / f"part-{number:05d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="none" if level is None else "zstd", compression_level=level)
    return path


def by_as_py(path: Path, out: Path) -> None:
    """Convert a shard into a store, reading it as tools/restore_datasets.py of ylsung/VL_adapter does."""
    table = pq.read_table(path)
    features = table.column("features")
    with FeatureWriter(out, tokens=36, dim=DIM) as writer:
        for number, id in enumerate(table.column("id").to_pylist()):
            row = np.asarray(features[number].as_py(), dtype=np.float16).reshape(1, TOKENS, DIM)
            writer.add([id], pool_rows(row, 6))


def decode(path: Path) -> None:
    """Read a shard's batches without converting them."""
    for batch in pq.ParquetFile(path, memory_map=True).iter_batches(batch_size=BATCH, use_threads=False):
        batch.column(1).flatten().flatten().to_numpy()


def seconds(function: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _peak(source: str, out: str, workers: int, pipe: object) -> None:
    before = _resident()
    convert_hub(source=source, out=Path(out), workers=workers)
    pipe.send((before, _resident()))  # type: ignore[attr-defined]


def _resident() -> float:
    """Return this process's peak memory in MB, not from ru_maxrss, which is inherited from the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def speeds(folder: Path, rows: int) -> Table:
    """Measure rows/s of both methods, one after the other."""
    paths = [shard(folder / "hub", number, rows) for number in range(SHARDS)]
    plain = shard(folder / "plain", 0, rows, None)
    slow = rows / seconds(lambda: by_as_py(paths[0], folder / "slow"))
    table = Table(title=f"{SHARDS} shards of {rows:,} rows ({TOKENS}, {DIM}), {os.cpu_count()} cores")
    for heading in ("way", "rows/s", "times as_py()", "621,783 rows take"):
        table.add_column(heading, justify="right")
    table.add_row("as_py() a row", f"{slow:,.1f}", "1", f"{621_783 / slow / 3600:.1f} h")
    total = 0.0
    for workers in (1, 2):
        out = folder / f"out{workers}"
        taken = seconds(lambda: convert_hub(source=str(folder / "hub"), out=out, workers=workers))  # noqa: B023
        total = taken if workers == 1 else total
        speed = SHARDS * rows / taken
        table.add_row(
            f"convert hub, workers={workers}", f"{speed:,.0f}", f"{speed / slow:.0f}", f"{621_783 / speed / 60:.0f} min"
        )
    packed, unpacked = (min(seconds(lambda: decode(p)) for _ in range(3)) for p in (paths[0], plain))  # noqa: B023
    table.caption = (
        f"of the time with one worker: zstd {(packed - unpacked) * SHARDS / total:.0%}, parquet's dictionary and lists "
        f"{unpacked * SHARDS / total:.0%}, the rest (pooling, checks, SHA-256, disk) {1 - packed * SHARDS / total:.0%}"
    )
    return table


def memory(folder: Path) -> Table:
    """Measure the peak memory with shards of the published size, in a new process."""
    for number in range(2):
        shard(folder / "full", number, FULL // 8, 1, repeat=8)
    table = Table("workers", "before [MB]", "peak [MB]", title=f"memory, shards of {FULL:,} rows")
    context = multiprocessing.get_context("spawn")
    for workers in (1, 2):
        mine, theirs = context.Pipe()
        arguments = (str(folder / "full"), str(folder / f"full-out{workers}"), workers, theirs)
        process = context.Process(target=_peak, args=arguments)
        process.start()
        before, peak = mine.recv()
        process.join()
        table.add_row(str(workers), f"{before:,.0f}", f"{peak:,.0f}")
    return table


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        console = Console()
        console.print(speeds(Path(name), int(sys.argv[1]) if len(sys.argv) > 1 else 512))
        console.print(memory(Path(name)))
