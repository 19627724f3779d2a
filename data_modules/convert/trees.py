"""``data convert h5`` and ``data convert npz``: folders with one file per image or clip to a feature store."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from data_modules.store.extras import need
from data_modules.store.frames import fit_clip
from data_modules.store.pooling import are_finite, pool_rows
from data_modules.store.resumable import Part, ResumableStore, Rows, fill
from data_modules.store.store import FeatureStoreError

SHARD_ROWS = 1024
BATCH = 64
KEY = "features"
Read = Callable[[Path], np.ndarray]


def convert_h5(*, source: Path, out: Path, pool: int | None = 6, shard_rows: int = SHARD_ROWS) -> None:
    """Convert a folder of IMG_ID.h5 files (dataset IMG_ID/features) into a feature store.

    Resumes an interrupted attempt.

    Args:
        source: Folder with the files, such as datasets/COCO/clip_features/data_clip_RN101_att.
        out: Folder of the store to write.
        pool: Side of the grid that square features are max-pooled to; null keeps all vectors.
        shard_rows: Number of images per shard.

    Raises:
        FileNotFoundError: If the folder has no such files.
        FeatureStoreError: If a file is damaged or its shape differs from the first file's, if OUT holds another store,
            or the disk is full.
        ValueError: If features cannot be pooled to this grid.
        ModuleNotFoundError: If h5py is not installed.
    """
    need("h5py")
    paths = _paths(source, "h5")
    first = read_h5(paths[0])
    tokens = pool_rows(first[None, :, :1], pool).shape[1]

    def rows(chunk: list[Path]) -> Iterator[Rows]:
        for start in range(0, len(chunk), BATCH):
            piece = chunk[start : start + BATCH]
            features = np.stack([_like(path, read_h5(path), first.shape) for path in piece])
            yield Rows([path.stem for path in piece], pool_rows(features, pool))

    record = {"tree": "h5", "vectors": first.shape[0], "pool": pool}
    _convert(paths, rows, out, tokens=tokens, dim=first.shape[1], record=record, shard_rows=shard_rows)


def convert_npz(*, source: Path, out: Path, frames: int = 64, shard_rows: int = SHARD_ROWS) -> None:
    """Convert a folder of VALUE's VIDEO.npz files (key features, one row per frame) into a feature store.

    Shorter clips are padded with zero rows and longer ones max-pooled over time, both as in the original. The store
    records the original number of frames. Resumes an interrupted attempt.

    Args:
        source: Folder with the files, such as video/vis_features/tv/clip-vit.
        out: Folder of the store to write.
        frames: Number of rows per clip in the store.
        shard_rows: Number of clips per shard.

    Raises:
        FileNotFoundError: If the folder has no such files.
        FeatureStoreError: If a file is damaged or its width differs from the first file's, if OUT holds another store,
            or the disk is full.
        ValueError: If ``frames`` is not positive.
    """
    if frames < 1:
        raise ValueError(f"frames must be 1 or more, got {frames}")
    paths = _paths(source, "npz")
    dim = read_npz(paths[0]).shape[1]

    def rows(chunk: list[Path]) -> Iterator[Rows]:
        for start in range(0, len(chunk), BATCH):
            piece = chunk[start : start + BATCH]
            clips = [_like(path, clip := read_npz(path), (len(clip), dim)) for path in piece]
            lengths = np.array([len(clip) for clip in clips], dtype=np.int32)
            yield Rows([path.stem for path in piece], np.stack([fit_clip(clip, frames) for clip in clips]), lengths)

    _convert(paths, rows, out, tokens=frames, dim=dim, record={"tree": "npz", "frames": frames}, shard_rows=shard_rows)


def _convert(
    paths: list[Path],
    rows: Callable[[list[Path]], Iterator[Rows]],
    out: Path,
    *,
    tokens: int,
    dim: int,
    record: dict[str, Any],
    shard_rows: int,
) -> None:
    chunks = [paths[start : start + shard_rows] for start in range(0, len(paths), shard_rows)]
    parts = [
        Part(
            f"{chunk[0].name} to {chunk[-1].name}",
            sum(p.stat().st_size for p in chunk),
            len(chunk),
            partial(rows, chunk),
        )
        for chunk in chunks
    ]
    store = ResumableStore(out, parts, tokens=tokens, dim=dim, extractor=record)
    state = "up to date" if store.complete else "written"
    fill([store], workers=1)  # HDF5 reads one file at a time
    Console().print(f"{state}: {out} ({len(paths):,} rows, {tokens} tokens of {dim})", soft_wrap=True)


def _paths(source: Path, suffix: str) -> list[Path]:
    paths = sorted(source.glob(f"*.{suffix}"), key=lambda path: path.name)
    if not paths:
        raise FileNotFoundError(f"no *.{suffix} in {source}: give --source the folder that the files lie in directly")
    return paths


def read_h5(path: Path) -> np.ndarray:
    """Read the ``(F, D)`` float16 features of an image.

    Raises:
        FeatureStoreError: If it cannot be read.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if path.stem not in file or KEY not in file[path.stem]:
                raise KeyError(f"no data set {path.stem}/{KEY}, only {', '.join(file) or 'nothing'}")
            return _halves(path, file[path.stem][KEY][...])
    except (OSError, KeyError) as error:
        raise FeatureStoreError(f"{path} cannot be read ({error}): fetch it again, or remove it") from error


def read_npz(path: Path) -> np.ndarray:
    """Read the ``(F, D)`` float16 features of a clip.

    Raises:
        FeatureStoreError: If it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if KEY not in file:
                raise KeyError(f"no key {KEY!r}, only {', '.join(file) or 'nothing'}")
            features = file[KEY]
    except (OSError, KeyError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise FeatureStoreError(f"{path} cannot be read ({error}): fetch it again, or remove it") from error
    return _halves(path, features)


def _halves(path: Path, features: np.ndarray) -> np.ndarray:
    if features.ndim != 2 or 0 in features.shape or features.dtype.kind != "f":
        raise FeatureStoreError(
            f"{path} holds {features.dtype} {features.shape} instead of floats (vectors, width): fetch it again, or "
            "remove it"
        )
    with np.errstate(over="ignore"):
        halves = features.astype(np.float16)
    if not are_finite(halves[None]).all():
        raise FeatureStoreError(f"{path} holds values that are not finite in float16: fetch it again, or remove it")
    return halves


def _like(path: Path, features: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if features.shape != shape:
        raise FeatureStoreError(
            f"{path} holds features of {features.shape} where the first file has {shape}: one folder must hold the "
            "features of one extractor"
        )
    return features
