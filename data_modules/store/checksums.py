"""Checksums of files that are remembered between runs, and of feature stores without reading their shards."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_modules.store.cache_home import cache_home
from data_modules.store.rows import AnyStore
from data_modules.store.store import checksum
from vlpet_lightning.atomic_file import atomic_write

FILE = "checksums.json"
KEPT = 1000  # files, the most recent ones
WORTH_KEEPING = 16 << 20  # bytes; smaller files are read in a few milliseconds
THREADS = 4

Stamp = list[int]
_known: dict[str, tuple[Stamp, str]] = {}


def _stamp(path: Path) -> Stamp:
    """Return what changes when a file is written: a copy that keeps the time of change has another change of status."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _remembered(file: Path) -> dict[str, tuple[Stamp, str]]:
    try:
        found = json.loads(file.read_text())
        return {name: (list(map(int, stamp)), str(value)) for name, (stamp, value) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # there is none yet, or it is damaged: files are read again


def file_checksums(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the SHA-256 of files; a large file that has not changed since an earlier run is not read again.

    Args:
        paths: The files.
    """
    given = {path: path.resolve() for path in paths}
    stamps = {path: _stamp(path) for path in given.values()}
    if any(str(path) not in _known for path in stamps):
        _known.update(_remembered(cache_home() / FILE) | _known)
    new = [path for path, stamp in stamps.items() if _known.get(str(path), (None, ""))[0] != stamp]
    with ThreadPoolExecutor(THREADS) as pool:  # hashing releases the interpreter
        for path, value in zip(new, pool.map(checksum, new), strict=True):
            _known[str(path)] = (stamps[path], value)
    if any(stamps[path][0] >= WORTH_KEEPING for path in new):
        _remember(cache_home() / FILE)
    return {path: _known[str(place)][1] for path, place in given.items()}


def _remember(file: Path) -> None:
    kept = {name: entry for name, entry in _known.items() if entry[0][0] >= WORTH_KEEPING}
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file, f".{os.getpid()}.part") as opened:
            opened.write(json.dumps(dict(list(kept.items())[-KEPT:])).encode())


def store_checksum(meta: Mapping[str, Any]) -> str:
    """Return a checksum of a store's contents from its ``meta.json``, which has the checksum of every file.

    Shards that are converted as they are streamed have none yet; their names and sizes count instead.
    """
    entries = [[entry["file"], entry.get("sha256") or entry["bytes"]] for entry in [*meta["index"], *meta["shards"]]]
    content = [meta["rows"], meta["tokens"], meta["dim"], meta.get("encoding", "float16"), entries]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def describe_store(store: AnyStore) -> dict[str, Any]:
    """Describe a store as plain data: sizes, checksum and extractor."""
    meta = store.meta
    sizes = {name: meta[name] for name in ("rows", "tokens", "dim")}
    encoding = meta.get("encoding", "float16")
    return {**sizes, "encoding": encoding, "checksum": store_checksum(meta), "extractor": dict(meta["extractor"])}
