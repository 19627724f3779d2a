"""Errors that our code raises on purpose, found inside those of the libraries that called it."""

from __future__ import annotations

import linecache
import os
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
PACKAGES = ("vlpet_lightning", "data_modules", "callbacks")
OURS = tuple(str(HERE / name) + os.sep for name in PACKAGES)


def for_the_user(error: BaseException | None) -> BaseException | None:
    """Return the error that our code raised on purpose, if any; a library may have wrapped it in its own error."""
    while error is not None:
        told = _of_worker(error)
        if told is not None:
            return told
        frames = traceback.extract_tb(error.__traceback__)
        if frames and frames[-1].filename.startswith(OURS):
            line = linecache.getline(frames[-1].filename, frames[-1].lineno or 0)
            if line.lstrip().startswith("raise"):  # any other failure of our code is a bug and shows its traceback
                return error
        error = error.__cause__
    return None


def _of_worker(error: BaseException) -> BaseException | None:
    """Return an error of our own kinds that a DataLoader's worker raised, without the traceback in its message."""
    kind, text = type(error), str(error)
    ours = kind.__module__.partition(".")[0] in PACKAGES
    if not ours or not text.startswith(f"Caught {kind.__name__} in DataLoader worker process"):
        return None
    _, found, message = text.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")
    return kind(message.strip()) if found else None
