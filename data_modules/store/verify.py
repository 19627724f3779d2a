"""``data verify`` and ``data info``: integrity and contents of feature stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data_modules.store.pooling import are_finite
from data_modules.store.store import META, SHOWN, FeatureStore, FeatureStoreError


def find_stores(path: Path) -> list[FeatureStore]:
    """Open the store at a path, or all stores of a data root.

    Raises:
        FeatureStoreError: If there is none, or one is incomplete.
    """
    if (path / META).is_file():
        return [FeatureStore(path)]
    base = path / "features" if (path / "features").is_dir() else path
    folders = sorted(folder.parent for folder in base.glob(f"*/{META}"))
    return [FeatureStore(folder) for folder in folders] if folders else [FeatureStore(path)]


def verify(*, store: Path, ids: Path | None = None) -> None:
    """Verify the checksums of all files of feature stores; exit with status 1 if a file is damaged.

    Args:
        store: A store, or a data root with several.
        ids: File to write the image ids of damaged shards to, one per line.

    Raises:
        FeatureStoreError: If there is no store, or files are damaged; the table printed before lists them and their
            ids.
    """
    stores = find_stores(store)
    console = Console()
    table = Table("file", "problem", "images", "ids", title="damaged files")
    lost: list[str] = []
    checked = damaged = 0
    for opened in stores:
        for entry in track(opened.files, description=f"checking {opened.path.name}", transient=True):
            checked += 1
            try:
                opened.verify_file(entry)
            except FeatureStoreError as error:
                damaged += 1
                held = _ids(opened, entry)
                lost += held
                shown = ", ".join(held[:SHOWN]) + (", ..." if len(held) > SHOWN else "")
                problem = (
                    str(error).removeprefix(f"{opened.path / entry['file']} ").split(" (it holds")[0].split(":")[0]
                )
                table.add_row(str(opened.path / entry["file"]), problem, f"{entry.get('rows', 0):,}", shown)
    if ids is not None:
        ids.write_text("".join(f"{id}\n" for id in lost))
    if damaged:
        console.print(table)
        raise FeatureStoreError(
            f"{damaged} of {checked} files are damaged, {len(lost):,} images are lost: copy these files again, or "
            "remove the store and make it again" + ("" if ids is not None else "; --ids FILE writes all ids")
        )
    console.print(f"whole: {len(stores)} stores, {checked} files")


def info(*, store: Path) -> None:
    """Show the contents of feature stores: rows, shapes, sizes and extractors.

    Args:
        store: A store, or a data root with several.

    Raises:
        FeatureStoreError: If there is no store.
    """
    table = Table("store", title="feature stores")
    for name in ("rows", "tokens", "dim", "shards", "GB"):
        table.add_column(name, justify="right")
    for name in ("pooled to", "model", "pretrained"):
        table.add_column(name, overflow="fold")
    records = []
    for opened in find_stores(store):
        record = opened.meta["extractor"]
        size = sum(entry["bytes"] for entry in opened.files) / 1e9
        pool = record.get("pool")
        made = ", ".join(f"{key} {value}" for key, value in record.items() if key != "pool" and value is not None)
        numbers = [f"{len(opened):,}", str(opened.tokens), str(opened.dim), str(len(opened.meta["shards"]))]
        grid = "not pooled" if pool is None else f"{pool}x{pool}"
        names = [str(record.get("model") or "unknown"), str(record.get("pretrained") or "")]
        table.add_row(opened.path.name, *numbers, f"{size:,.3f}", grid, *names)
        records.append(f"{opened.path.name}: {made or 'made by an unknown extractor'}")
    console = Console()
    console.print(table)
    for text in records:
        console.print(text, markup=False, highlight=False, overflow="fold")


def _ids(store: FeatureStore, entry: dict[str, object]) -> list[str]:
    try:
        return store.ids_in(entry)
    except FeatureStoreError:  # the file with the ids is damaged, too
        return []


def odd_rows(store: FeatureStore, rows: np.ndarray) -> dict[str, list[str]]:
    """Find rows whose features cannot be right.

    Args:
        store: The store.
        rows: ``(n,)`` row numbers.

    Returns:
        Ids of the rows with values that are ``not finite``, and of those that are ``all zero``.

    Raises:
        FeatureStoreError: If a shard is missing or damaged.
    """
    features = store.gather(rows)
    finite = are_finite(features)
    zero = ~np.ascontiguousarray(features).view(np.int16).reshape(len(rows), -1).any(axis=1)
    ids = np.array([store.ids_between(int(row), int(row) + 1)[0] for row in rows[~finite | zero]], dtype=object)
    bad = ~finite[~finite | zero]
    return {"not finite": ids[bad].tolist(), "all zero": ids[~bad].tolist()}
