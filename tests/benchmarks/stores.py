"""The feature store compared with other formats: ``python -m tests.benchmarks.stores [rows]``.

All contain the same rows and return the same shuffled batches of 64, in one process from a warm cache; a batch is one
``(64, 36, 2048)`` array. webdataset has no random access; it shuffles in a buffer of 1,000. Needs
``pip install litdata webdataset``; formats whose package is missing are skipped and listed.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import h5py
import numpy as np
from rich.console import Console
from rich.table import Table

from data_modules.store.encodings import ENCODINGS
from data_modules.store.recode import recode
from data_modules.store.store import FeatureStore
from data_modules.store.writer import FeatureWriter

TOKENS, DIM, BATCH, ROUNDS = 36, 2048, 64, 3
Batches = Callable[[list[np.ndarray]], Iterator[np.ndarray]]


def random_rows(count: int) -> np.ndarray:
    """Return random rows with half zeros, as after a ReLU."""
    values = np.random.default_rng(0).standard_normal((min(count, 500), TOKENS, DIM), dtype=np.float32)
    return np.resize(np.maximum(values, 0).astype(np.float16), (count, TOKENS, DIM))


def plain_map(folder: Path, rows: np.ndarray) -> Batches:
    np.save(folder / "plain.npy", rows)
    mapped = np.load(folder / "plain.npy", mmap_mode="r")
    return lambda plans: (mapped[plan] for plan in plans)


def stores(folder: Path, rows: np.ndarray) -> FeatureStore:
    with FeatureWriter(folder / "store", tokens=TOKENS, dim=DIM, shard_bytes=64 * 2**20) as writer:
        writer.add([str(number) for number in range(len(rows))], rows)
    return FeatureStore(folder / "store")


def recoded(folder: Path, rows: np.ndarray, name: str) -> Batches:
    out = folder / "store"
    if name != "float16":
        out = folder / name
        with contextlib.redirect_stdout(io.StringIO()):
            recode(source=folder / "store", out=out, rows=name)
    store = FeatureStore(out)
    return lambda plans: (store.gather(plan) for plan in plans)


def h5_file_an_image(folder: Path, rows: np.ndarray) -> Batches:
    (folder / "h5").mkdir()
    for number, row in enumerate(rows):
        with h5py.File(folder / "h5" / f"{number}.h5", "w") as file:
            file[f"{number}/features"] = row

    def read(number: int) -> np.ndarray:
        with h5py.File(folder / "h5" / f"{number}.h5") as file:
            return file[f"{number}/features"][:]

    return lambda plans: (np.stack([read(number) for number in plan]) for plan in plans)


def h5_one_data_set(folder: Path, rows: np.ndarray) -> Batches:
    with h5py.File(folder / "one.h5", "w") as file:
        file.create_dataset("features", data=rows, chunks=(1, TOKENS, DIM))
    opened = h5py.File(folder / "one.h5")["features"]
    return lambda plans: (np.stack([opened[number] for number in plan]) for plan in plans)


def litdata(folder: Path, rows: np.ndarray) -> Batches:
    import litdata as lit

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        lit.optimize(
            fn=partial(_item, str(folder / "plain.npy")),
            inputs=list(range(len(rows))),
            output_dir=str(folder / "litdata"),
            chunk_bytes="64MB",
            num_workers=1,
        )
    dataset = lit.StreamingDataset(str(folder / "litdata"), batch_decode=False)
    return lambda plans: (np.stack([np.asarray(dataset[int(n)]["features"]) for n in plan]) for plan in plans)


def litdata_in_order(folder: Path, rows: np.ndarray) -> Batches:
    import litdata as lit

    dataset = lit.StreamingDataset(str(folder / "litdata"), shuffle=True, batch_decode=False)
    return lambda plans: _batches(item["features"] for item in dataset)


def _item(path: str, number: int) -> dict[str, np.ndarray]:
    return {"features": np.load(path, mmap_mode="r")[number].copy()}


def webdataset(folder: Path, rows: np.ndarray) -> Batches:
    import webdataset as wds

    (folder / "wds").mkdir()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        wds.ShardWriter(str(folder / "wds/%04d.tar"), maxsize=2**26) as sink,
    ):
        for number, row in enumerate(rows):
            sink.write({"__key__": str(number), "npy": row})
    urls = sorted(str(path) for path in (folder / "wds").glob("*.tar"))
    dataset = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).decode().to_tuple("npy")
    return lambda plans: _batches(row for (row,) in dataset)


def _batches(rows: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    batch: list[np.ndarray] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            yield np.stack(batch)
            batch = []


def speed(batches: Batches, plans: list[np.ndarray]) -> float:
    """Return the best samples/s over several rounds."""
    best = 0.0
    for _ in range(ROUNDS):
        start, count = time.perf_counter(), 0
        for batch in batches(plans):
            count += len(batch)
        best = max(best, count / (time.perf_counter() - start))
    return best


def size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def compare(folder: Path, count: int) -> Table:
    rows = random_rows(count)
    plans = list(np.random.default_rng(1).permutation(count)[: count // BATCH * BATCH].reshape(-1, BATCH))
    title = f"({TOKENS}, {DIM}) float16, {count:,} rows, batches of {BATCH}, shuffled, in process, warm"
    table = Table("way", title=title)
    for heading in ("samples/s", "of a plain map", "bytes a row"):
        table.add_column(heading, justify="right")
    ways: dict[str, tuple[str, Callable[[Path, np.ndarray], Batches]]] = {
        "plain memory map": ("plain.npy", plain_map),
        "our store, float16": ("store", partial(recoded, name="float16")),
        **{f"our store, {name}": (name, partial(recoded, name=name)) for name in ENCODINGS[1:]},
        "HDF5, one file an image": ("h5", h5_file_an_image),
        "HDF5, one chunked data set": ("one.h5", h5_one_data_set),
        "litdata, at random": ("litdata", litdata),
        "litdata, its own shuffled order": ("litdata", litdata_in_order),
        "webdataset, shuffled in a buffer": ("wds", webdataset),
    }
    stores(folder, rows)
    base, missing = 0.0, []
    for name, (path, way) in ways.items():
        try:
            rate = speed(way(folder, rows), plans)
        except ModuleNotFoundError as error:
            missing.append(f"{name} ({error})")
            continue
        base = base or rate
        table.add_row(name, f"{rate:,.0f}", f"{rate / base:.0%}", f"{size(folder / path) / count:,.0f}")
    table.caption = f"not measured: {', '.join(missing)}" if missing else None
    return table


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as name:
        Console().print(compare(Path(name), int(sys.argv[1]) if len(sys.argv) > 1 else 4_000))
