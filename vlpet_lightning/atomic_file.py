"""Atomic file writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path, suffix: str = ".part") -> Iterator[BinaryIO]:
    """Open a temporary file that is renamed to ``path`` after the block succeeds and the data is synced to disk.

    Args:
        path: Final path of the file.
        suffix: Suffix of the temporary name; use one per process if several may write the same file.
    """
    part = path.with_name(f"{path.name}{suffix}")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # sync the rename as well
    finally:
        os.close(folder)


def check_folder(path: Path) -> None:
    """Check that a path is a folder or can be created as one.

    Raises:
        FileExistsError: If the path or one of its parents is a file.
    """
    there = next(part for part in (path, *path.absolute().parents) if part.exists())
    if not there.is_dir():
        raise FileExistsError(f"--out is {path}, and {there} is a file: give a folder, or a name that is free")
