"""``manifest.json.gz`` of ylsung/VL-Adapter-datasets: the expected contents of every published file.

An entry describes a file of the original archive: its ``path``, ``size``, CRC-32, and the published file (``shard``)
that contains it (tools/convert_zip_to_hf.py of ylsung/VL_adapter). Annotations are published unchanged, so their size
and CRC can be checked. Features are published as rows of parquet files: size and CRC are those of the HDF5 file that a
row comes from and cannot be checked, but the ids of a shard can. Entries of ``images/`` are listed but not published.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any

from data_modules.store.store import FeatureStoreError

NAME = "manifest.json.gz"
REPOSITORY = "ylsung/VL-Adapter-datasets"
VARIANT = "data_clip_RN101_att"
DATASETS = ("COCO", "GQA", "VG", "nlvr")
FETCH = "fetch it again (python -m vlpet_lightning data download)"


@dataclass
class Manifest:
    """Expected contents of the published files.

    Args:
        shards: Ids of each feature shard.
        files: Size and CRC-32 of each annotation file.
    """

    shards: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    files: dict[str, tuple[int, int]] = field(default_factory=dict)

    def shards_of(self, dataset: str) -> list[str]:
        """Return the feature shards of a data set."""
        return sorted(name for name in self.shards if name.startswith(f"features/{dataset}/{VARIANT}/"))

    def problem(self, name: str, size: int, crc: int) -> str | None:
        """Check size and CRC-32 of an annotation file; returns the problem, or None if they match or are not listed."""
        wanted = self.files.get(name)
        if wanted is None or wanted == (size, crc):
            return None
        if wanted[0] != size:
            return f"has {size:,} bytes, the manifest says {wanted[0]:,}"
        return f"has CRC-32 {crc:08x}, the manifest says {wanted[1]:08x}"


def read_manifest(file: IO[bytes], name: str) -> Manifest:
    """Read a manifest without holding a record per image in memory.

    Raises:
        FeatureStoreError: If it is damaged.
    """
    manifest = Manifest()

    def fold(record: dict[str, Any]) -> Any:
        if "files" in record:
            return record["root"]
        shard = record["shard"]
        if shard.startswith("features/"):
            manifest.shards[shard].append(PurePosixPath(record["path"]).stem)
        elif shard.startswith("annotations/"):
            manifest.files[shard] = (int(record["size"]), int(record["crc"]))
        return None

    try:
        with gzip.open(file) as unpacked:
            root = json.load(unpacked, object_hook=fold)
        if not isinstance(root, str):
            raise ValueError("it has no root and files")
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FeatureStoreError(f"{name} cannot be read ({error!r}): {FETCH}") from error
    return manifest


def crc_of(blocks: Iterable[bytes]) -> int:
    """Compute the CRC-32 of a file's blocks."""
    crc = 0
    for block in blocks:
        crc = zlib.crc32(block, crc)
    return crc


def chosen(datasets: str | None, available: Iterable[str]) -> list[str]:
    """Parse a comma-separated list of data sets; None selects all that are available.

    Raises:
        ValueError: If one is unknown.
    """
    known = list(available)
    names = known if datasets is None else [name.strip() for name in datasets.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"no features of {name!r}: choose from {', '.join(known) or 'none'}")
    return list(dict.fromkeys(names))
