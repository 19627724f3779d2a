"""On-disk cache of arrays that are slow to make, such as tokenised texts and annotations."""

from __future__ import annotations

import os
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from vlpet_lightning.atomic_file import atomic_write

Arrays = dict[str, np.ndarray]
KEPT_BYTES = 4 * 2**30  # least recently used files are removed beyond this size
DAY = 24 * 3600.0


class ArrayCache:
    """A folder of arrays, keyed by a digest of all their inputs.

    A damaged file or an unwritable folder is not an error: the arrays are made again.

    Args:
        folder: Cache folder; created on the first write.
        kept_bytes: Maximum size; beyond it, the least recently used files are removed.
    """

    def __init__(self, folder: Path, kept_bytes: int = KEPT_BYTES) -> None:
        self.folder = folder
        self.kept_bytes = kept_bytes

    def get(
        self, key: str, names: set[str], make: Callable[[], Arrays], worth_keeping: Callable[[Arrays], bool]
    ) -> Arrays:
        """Return the arrays of a key, with these names, from the cache or newly created."""
        path = self.folder / f"{key}.npz"
        found = _load(path)
        if found is not None and found.keys() == names:
            with suppress(OSError):
                os.utime(path)
            return found
        made = make()
        if worth_keeping(made):
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                with atomic_write(path, f".{os.getpid()}.part") as file:  # several ranks may write the same file
                    np.savez(file, allow_pickle=False, **made)
                self._prune(path)
        return made

    def _prune(self, newest: Path) -> None:
        files = sorted(self.folder.glob("*.npz"), key=lambda path: path.stat().st_mtime, reverse=True)
        total = newest.stat().st_size
        for path in files:
            if path != newest:
                total += path.stat().st_size
                if total > self.kept_bytes:
                    path.unlink(missing_ok=True)
        for path in self.folder.glob("*.part"):  # left by killed processes
            if path.stat().st_mtime < time.time() - DAY:
                path.unlink(missing_ok=True)


def _load(path: Path) -> Arrays | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}  # reading verifies the archive's checksums
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):  # if damaged
        return None
