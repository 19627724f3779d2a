"""Atomic file writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path, suffix: str = ".part") -> Iterator[BinaryIO]:
    """Open a file for writing; it gets its name when the block has succeeded and all of it is on disk.

    Args:
        path: The file.
        suffix: Suffix of the temporary name; it must be unique if several processes may write the same file.
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
        os.fsync(folder)  # the new directory entry
    finally:
        os.close(folder)


def check_folder(path: Path) -> None:
    """Check that a path is a folder, or that one can be created there.

    Raises:
        FileExistsError: If a file is in the way.
    """
    there = next(part for part in (path, *path.absolute().parents) if part.exists())
    if not there.is_dir():
        raise FileExistsError(f"--out is {path}, and {there} is a file: give a folder, or a name that is free")
