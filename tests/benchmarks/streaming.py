"""Cost of streaming: ``python -m tests.benchmarks.streaming [rows of a shard]``.

A store of 40 shards is streamed from a web server on this machine into caches of several sizes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from data_modules.batches.sampling import TaskMixSampler
from data_modules.store.store import FeatureStore
from data_modules.store.writer import FeatureWriter
from data_modules.streaming.order import order_of, windows
from data_modules.streaming.streamed_store import Stream, StreamedStore, open_stream
from tests.data_modules.streaming.faulty_server import Site, serve

TOKENS, DIM = 36, 2048
SHARDS, BATCH = 40, 64
QUESTIONS = 4  # samples per image


def make(root: Path, rows: int) -> FeatureStore:
    """Write a store of random features."""
    rng = np.random.default_rng(0)
    path = root / "features" / "COCO"
    with FeatureWriter(path, tokens=TOKENS, dim=DIM, shard_bytes=rows * TOKENS * DIM * 2) as writer:
        for shard in range(SHARDS):
            features = rng.standard_normal((rows, TOKENS, DIM), dtype=np.float32).astype(np.float16)
            writer.add([f"{shard}_{row}" for row in range(rows)], features)
    return FeatureStore(path)


def plans(images: np.ndarray, store: StreamedStore | None) -> TaskMixSampler:
    """Return the sampler of an epoch, in the order of the store or fully random."""
    orders = {}
    if store is not None:
        window = windows({"vqa": store}, {"vqa": 1}, together=True)["vqa"]
        orders = {"vqa": order_of(store, images, window)}
    return TaskMixSampler({"vqa": len(images)}, {"vqa": BATCH}, orders=orders)


def epoch(store: FeatureStore, images: np.ndarray, sampler: TaskMixSampler, limit: int | None = None) -> float:
    """Gather the features of an epoch and return samples/s."""
    count, start = 0, time.perf_counter()
    for number, plan in enumerate(sampler):
        if number == limit:
            break
        store.expect(plan.ahead)
        store.gather(images[plan.rows, 0])
        count += len(plan.rows)
    return count / (time.perf_counter() - start)


def speeds(root: Path, site: Site, local: FeatureStore, images: np.ndarray) -> Table:
    """Measure samples/s of a local store and of streamed ones."""
    table = Table(title=f"{len(images):,} samples of {len(local):,} images, {SHARDS} shards, batch {BATCH}")
    for heading in ("store", "order", "cache", "shards fetched", "epoch", "samples/s"):
        table.add_column(heading, justify="right")
    for _ in range(2):
        speed = epoch(local, images, plans(images, None))
    table.add_row("local", "random", "", "", "warm", f"{speed:,.0f}")
    total = sum(entry["bytes"] for entry in local.meta["shards"])
    for share, ordered, limit in ((1.1, True, None), (0.25, True, None), (0.25, False, 60)):
        stream = Stream(cache=str(root / f"cache-{share}-{ordered}"), max_gb=share * total / 1e9, threads=2)
        store = open_stream(site.url, "COCO", stream)
        sampler = plans(images, store if ordered else None)
        for name in ("first", "second") if limit is None else ("first",):
            site.gets.clear()
            speed = epoch(store, images, sampler, limit)
            fetched = sum(site.fetched("shard-").values())
            shown = f"{fetched}"
            if limit is not None:
                shown = f"{fetched * len(sampler) / limit:,.0f} ({fetched} in {limit} of {len(sampler)} batches)"
            table.add_row("streamed", "by shard" if ordered else "random", f"{share:.0%}", shown, name, f"{speed:,.0f}")
    return table


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = make(folder / "root", int(sys.argv[1]) if len(sys.argv) > 1 else 128)
        order = np.random.default_rng(1).permutation(np.repeat(np.arange(len(made)), QUESTIONS))[:, None]
        with serve(folder / "root") as server:
            Console().print(speeds(folder, server, made, order))
