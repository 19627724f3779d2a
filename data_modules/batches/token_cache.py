"""On-disk cache of tokenised texts: a split is tokenised once instead of at every start and on every rank."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlpet_lightning.atomic_file import atomic_write

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Arrays = dict[str, np.ndarray]
KEPT_BYTES = 4 * 2**30  # least recently used files are removed beyond this size
FORMAT = "1"
DAY = 24 * 3600.0


class TokenCache:
    """A folder of arrays, keyed by a digest of all their inputs.

    A damaged file or an unwritable folder is not an error: the texts are tokenised again.

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


def digest(tokenizer: PreTrainedTokenizerBase, settings: Iterable[object], texts: Iterable[str]) -> str:
    """Return a digest of a tokenizer with its vocabulary, of settings, and of texts in order."""
    found = hashlib.blake2b(digest_size=20)
    versions = (FORMAT, version("tokenizers"), version("transformers"))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = {"vocabulary": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    for state in ("truncation", "padding"):  # state left by the last call
        words.pop(state, None)
    for part in (*versions, type(tokenizer).__name__, json.dumps(words, sort_keys=True), *map(repr, settings)):
        _add(found, part)
    for text in texts:
        _add(found, text)
    return found.hexdigest()


def _add(found: hashlib.blake2b, text: str) -> None:
    content = text.encode("utf-8", "surrogatepass")
    found.update(len(content).to_bytes(8, "little"))
    found.update(content)
