"""Speed of the feature store, compared with a plain memory map: ``python -m tests.benchmarks.features [rows]``."""

from __future__ import annotations

import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from data_modules.store.store import FeatureStore
from data_modules.store.writer import FeatureWriter

TOKENS, DIM = 36, 2048
ROUNDS = 5


def make(path: Path, count: int, shard_rows: int) -> FeatureStore:
    """Write a store of random rows."""
    rng = np.random.default_rng(0)
    with FeatureWriter(path, tokens=TOKENS, dim=DIM, shard_bytes=shard_rows * TOKENS * DIM * 2) as writer:
        for start in range(0, count, 500):
            rows = rng.random((min(500, count - start), TOKENS, DIM), dtype=np.float32)
            writer.add([str(start + i) for i in range(len(rows))], rows)
    return FeatureStore(path)


def speed(gather: object, batches: list[np.ndarray]) -> float:
    """Return the best samples/s over several rounds."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for batch in batches:
            gather(batch)  # type: ignore[operator]
        times.append(time.perf_counter() - start)
    return sum(map(len, batches)) / min(times)


def gathers(folder: Path, count: int) -> Table:
    """Measure the speed of shuffled gathers in one process with a warm cache."""
    plain = np.lib.format.open_memmap(folder / "plain.npy", "w+", np.float16, (count, TOKENS, DIM))
    one, many = make(folder / "one", count, count), make(folder / "many", count, max(1, count // 6))
    plain[:] = one.gather(np.arange(count))
    plain = np.load(folder / "plain.npy", mmap_mode="r")
    table = Table(title=f"gather of ({TOKENS}, {DIM}) float16, {count:,} rows, shuffled, in process")
    for heading in ("batch", "plain map [rows]", "one shard", "six shards", "one / plain", "six / plain"):
        table.add_column(heading, justify="right")
    for size in (64, 500):
        rng = np.random.default_rng(1)
        batches = [rng.choice(count, size, replace=False) for _ in range(3000 // size)]
        base, single, several = (speed(g, batches) for g in (plain.__getitem__, one.gather, many.gather))
        cells = [f"{base:,.0f}", f"{single:,.0f}", f"{several:,.0f}", f"{single / base:.2f}", f"{several / base:.2f}"]
        table.add_row(str(size), *cells)
    return table


def opening(folder: Path, count: int = 1_000_000) -> Table:
    """Measure time and memory for opening a store of many ids and looking up a batch."""
    with FeatureWriter(folder / "wide", tokens=1, dim=1) as writer:
        for start in range(0, count, 50_000):
            writer.add([f"COCO_train2014_{i:012d}" for i in range(start, start + 50_000)], np.zeros((50_000, 1, 1)))
    tracemalloc.start()
    start_time = time.perf_counter()
    store = FeatureStore(folder / "wide")
    store.rows([f"COCO_train2014_{i:012d}" for i in range(0, count, count // 500)])
    elapsed = time.perf_counter() - start_time
    peak = tracemalloc.get_traced_memory()[1]
    table = Table(title=f"opening a store of {count:,} ids and finding 500")
    table.add_column("seconds", justify="right")
    table.add_column("peak MB", justify="right")
    table.add_row(f"{elapsed:.3f}", f"{peak / 1e6:.1f}")
    return table


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        rows = int(sys.argv[1]) if len(sys.argv) > 1 else 6_000
        console = Console()
        console.print(gathers(Path(name), rows))
        console.print(opening(Path(name)))
