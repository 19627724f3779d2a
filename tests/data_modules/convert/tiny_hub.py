"""A small copy of the published layout of VL-Adapter's features."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TOKENS, DIM, ROWS = 49, 2048, 5
SHARDS = {"COCO": 3, "nlvr": 1}
ANNOTATIONS = {"vqa/karpathy_train.json": b'[{"sent": "a"}]', "COCO/dataset_coco.json": b"{}\n"}


def features(count: int = ROWS, seed: int = 0, *, signed: bool = False) -> np.ndarray:
    """Return random rows, mostly zeros as after a ReLU."""
    values = np.random.default_rng(seed).normal(-0.0 if signed else -0.7, 1, (count, TOKENS, DIM))
    return (values if signed else np.maximum(values, 0)).astype(np.float16)


def ids(dataset: str, shard: int, count: int = ROWS) -> list[str]:
    return [f"{dataset}_{shard}_{number:06d}" for number in range(count)]


def part(dataset: str, shard: int) -> str:
    return f"features/{dataset}/data_clip_RN101_att/part-{shard:05d}.parquet"


def table(names: list[str], rows: np.ndarray) -> pa.Table:
    flat = pa.array(rows.reshape(-1), type=pa.float16())
    inner = pa.FixedSizeListArray.from_arrays(flat, rows.shape[2])
    return pa.table({"id": pa.array(names), "features": pa.FixedSizeListArray.from_arrays(inner, rows.shape[1])})


def write_shard(path: Path, content: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(content, path, compression="zstd", compression_level=1)


def write_manifest(root: Path, shards: dict[str, list[str]], annotations: dict[str, bytes] = ANNOTATIONS) -> None:
    files = [
        {
            "path": f"{shard.split('/')[1]}/clip_features/data_clip_RN101_att/{id}.h5",
            "size": 9,
            "crc": 8,
            "shard": shard,
        }
        for shard, names in shards.items()
        for id in names
    ]
    for name, content in annotations.items():
        crc = zlib.crc32(content)
        files.append({"path": name, "size": len(content), "crc": crc, "shard": f"annotations/{name}"})
    files.append({"path": "nlvr/images/a.png", "size": 1, "crc": 1, "shard": "images/nlvr/part-00000.parquet"})
    with gzip.open(root / "manifest.json.gz", "wt") as file:
        json.dump({"root": "vlt5_dataset/", "files": files}, file)


def make_hub(root: Path, rows: int = ROWS) -> Path:
    """Write a tree like that of ``data download``."""
    shards = {part(name, n): ids(name, n, rows) for name, count in SHARDS.items() for n in range(count)}
    for seed, (name, names) in enumerate(shards.items()):
        write_shard(root / name, table(names, features(rows, seed)))
    for name, content in ANNOTATIONS.items():
        (root / "annotations" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "annotations" / name).write_bytes(content)
    write_manifest(root, shards)
    return root


def write_h5(folder: Path, names: list[str], rows: np.ndarray) -> None:
    """Write HDF5 files as tools/restore_datasets.py of VL-Adapter does."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, row in zip(names, rows, strict=True):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file.create_group(name).create_dataset("features", data=row, dtype="float16")
