"""Files that are there in whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path, suffix: str = ".part") -> Iterator[BinaryIO]:
    """Open a file that gets its name when the block has ended well and all of it is on the disk.

    Args:
        path: The file.
        suffix: Of its name until then; one of its own where several processes may write the same file.
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
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)


def check_folder(path: Path) -> None:
    """Look whether a folder is at a path, or can be made there.

    Raises:
        FileExistsError: If a file is in its place.
    """
    there = next(part for part in (path, *path.absolute().parents) if part.exists())
    if not there.is_dir():
        raise FileExistsError(f"--out is {path}, and {there} is a file: give a folder, or a name that is free")
