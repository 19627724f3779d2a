"""``data recode``: re-encode the rows of a feature store, and report size and error."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from data_modules.store.encodings import ENCODINGS
from data_modules.store.resumable import Part, ResumableStore, Rows, fill
from data_modules.store.store import FeatureStore, FeatureStoreError

BATCH = 64
SAMPLE = 4096  # rows on which errors are measured


def recode(*, source: Path, out: Path, rows: str, workers: int = 2) -> None:
    """Write a copy of a feature store with another row encoding, and show its size and error.

    Resumes an interrupted attempt.

    Args:
        source: The store.
        out: Folder of the store to write.
        rows: float16, unchanged; uint8, 8 bits per value; zstd or lz4, lossless compression.
        workers: Number of shards written in parallel.

    Raises:
        FeatureStoreError: If a file of the source does not match its checksum, if OUT holds another store, or if the
            disk is full.
        ValueError: If there is no such encoding.
        ModuleNotFoundError: If the encoding needs pyarrow and pyarrow is not installed.
    """
    if rows not in ENCODINGS:
        raise ValueError(f"--rows is {rows!r}: choose from {', '.join(ENCODINGS)}")
    if out.resolve() == source.resolve():
        raise FeatureStoreError(f"--source and --out are both {source}: choose another --out")
    store = FeatureStore(source)
    for entry in store.meta["index"]:
        store.verify_file(entry)
    counts = [entry["rows"] for entry in store.meta["shards"]]
    starts = np.concatenate([[0], np.cumsum(counts)]).tolist()
    parts = [
        Part(entry["file"], entry["bytes"], entry["rows"], partial(_pieces, store, entry, starts[number]))
        for number, entry in enumerate(store.meta["shards"])
    ]
    record = dict(store.meta["extractor"])
    if store.encoding.lossy:
        record["rounded to"] = store.encoding.name  # the rounding error stays, whatever the new encoding
    written = ResumableStore(out, parts, tokens=store.tokens, dim=store.dim, extractor=record, rows=rows)
    state = "up to date" if written.complete else "written"
    fill([written], workers=workers)
    console = Console()
    console.print(f"{state}: {out} ({len(store):,} rows, {rows})", soft_wrap=True)
    console.print(_costs(store, FeatureStore(out)))


def _pieces(store: FeatureStore, entry: dict[str, Any], start: int) -> Iterator[Rows]:
    store.verify_file(entry)  # the new shard gets its own checksum, which would hide any damage
    ids = store.ids_between(start, start + entry["rows"])
    for first in range(0, len(ids), BATCH):
        names = ids[first : first + BATCH]
        numbers = np.arange(start + first, start + first + len(names))
        yield Rows(names, store.gather(numbers), store.lengths(numbers))


def _costs(before: FeatureStore, after: FeatureStore) -> Table:
    chosen = np.unique(np.linspace(0, len(before) - 1, min(SAMPLE, len(before))).astype(np.int64))
    largest, squares, power = 0.0, 0.0, 0.0
    for start in range(0, len(chosen), BATCH):
        was, now = (store.gather(chosen[start : start + BATCH]).astype(np.float64) for store in (before, after))
        error = np.abs(was - now)
        span = was.max(axis=2, keepdims=True) - was.min(axis=2, keepdims=True)
        largest = max(largest, float((error / np.where(span > 0, span, 1)).max()))
        squares, power = squares + float((error**2).sum()), power + float((was**2).sum())
    sizes = [sum(entry["bytes"] for entry in store.meta["shards"]) for store in (before, after)]
    table = Table("rows", "GB", "share", "largest error", "RMS error", title=f"error on {len(chosen):,} rows")
    table.caption = "largest: of its vector's range; RMS: of the features' RMS"
    table.add_row(before.encoding.name, f"{sizes[0] / 1e9:,.3f}", "100 %", "", "")
    relative = (squares / power) ** 0.5 if power else 0.0
    share = f"{sizes[1] / sizes[0]:.0%}".replace("%", " %")
    table.add_row(after.encoding.name, f"{sizes[1] / 1e9:,.3f}", share, f"{largest:.3%}", f"{relative:.3%}")
    return table
