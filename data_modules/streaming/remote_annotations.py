"""Local copies of annotation files at a URL."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from data_modules.streaming.cache import disk, locked
from data_modules.streaming.fetch import Remote, version_of
from data_modules.streaming.sources import manifest_at
from vlpet_lightning.atomic_file import atomic_write


def mirror_of(url: str, cache: Path) -> Path:
    """Return the cache folder for the files of a URL."""
    return cache / f"files-{hashlib.sha256(url.encode()).hexdigest()[:16]}"


def mirror(root: Remote, names: Sequence[str], folder: Path, *, optional: Sequence[str] = ()) -> None:
    """Copy files of a data root, or of its folder ``annotations``; unchanged files are not copied again.

    Args:
        root: The data root.
        names: Names of the files.
        folder: Target folder; the names stay the same.
        optional: Names of files that may be missing.

    Raises:
        FileNotFoundError: If a required file is missing.
        FeatureStoreError: If a file cannot be read or does not match the manifest, or the disk is full.
    """
    for name in names:
        there = [_copied(root, candidate, folder) for candidate in (name, f"annotations/{name}")]
        if not any(there) and name not in optional:
            raise FileNotFoundError(
                f"no annotation file {name} at {root.url} (nor at {root.url}/annotations), or it may not be read: "
                "check data.init_args.root"
            )


def _copied(root: Remote, name: str, folder: Path) -> bool:
    info = (root / name).info()
    path = folder / name
    note = path.with_name(f"{path.name}.version")
    with disk(path):
        if info is None:
            path.unlink(missing_ok=True)
            return False
        version = json.dumps(version_of(info))
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f"{path.name}.lock")):
            if not (path.is_file() and note.is_file() and note.read_text() == version):
                note.unlink(missing_ok=True)
                _copy(root, name, path)
                with atomic_write(note) as file:
                    file.write(version.encode())
    return True


def _copy(root: Remote, name: str, path: Path) -> None:
    manifest = manifest_at(root)
    size, crc = (None, None) if manifest is None else manifest.files.get(name, (None, None))
    remote = root / name
    with atomic_write(path) as file:
        remote.retry(lambda: remote.copy(file, size=size, crc=crc))
