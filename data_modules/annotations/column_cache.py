"""Cache of the columns of large training splits: annotation files are decoded once instead of at every start."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_modules.annotations.columns import column_of
from data_modules.annotations.records import Samples
from data_modules.store.array_cache import ArrayCache, Arrays
from vlpet_lightning.version import __version__

FORMAT = "1"  # to be changed with a reader's results
KEEP_FROM = 20_000  # samples; fewer are read in less than a second
COLUMNS = {
    "ids": ("content", "offsets"),
    **dict.fromkeys(("texts", "images", "answers"), ("codes", "content", "offsets")),
}
BUFFER = 1 << 20


def cached_samples(
    cache: ArrayCache, files: Iterable[Path], settings: Iterable[object], read: Callable[[], Samples]
) -> Samples:
    """Return samples without references or subtitles from the cache, or read them.

    Args:
        cache: The cache.
        files: The annotation files. Their contents are part of the key: reading them is much faster than decoding them.
        settings: Everything else that the samples depend on.
        read: Reads the samples.
    """
    names = {f"{column}.{name}" for column, parts in COLUMNS.items() for name in parts} | {"scores", "offsets"}
    found = cache.get(_digest(files, settings), names, lambda: _arrays(read()), _is_large)
    return _samples(found)


def _digest(files: Iterable[Path], settings: Iterable[object]) -> str:
    found = hashlib.blake2b(repr((FORMAT, __version__, *settings)).encode(), digest_size=20)
    for path in files:
        content = hashlib.blake2b()
        with path.open("rb") as file:
            while part := file.read(BUFFER):
                content.update(part)
        found.update(content.digest())
    return found.hexdigest()


def _arrays(samples: Samples) -> Arrays:
    columns = {name: getattr(samples, name).arrays() for name in COLUMNS}
    flat = {f"{column}.{name}": array for column, arrays in columns.items() for name, array in arrays.items()}
    return flat | {"scores": samples.scores, "offsets": samples.offsets}


def _samples(arrays: Mapping[str, np.ndarray]) -> Samples:
    columns: dict[str, Any] = {
        column: column_of({name: arrays[f"{column}.{name}"] for name in parts}) for column, parts in COLUMNS.items()
    }
    return Samples(**columns, scores=arrays["scores"], offsets=arrays["offsets"])


def _is_large(arrays: Arrays) -> bool:
    return len(arrays["offsets"]) > KEEP_FROM
