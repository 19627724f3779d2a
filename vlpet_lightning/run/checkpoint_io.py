"""Atomic checkpoint writes."""

from __future__ import annotations

import errno
import io
import os
import shutil
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol

from vlpet_lightning.atomic_file import atomic_write

ABANDONED = 3600.0  # seconds; no write takes this long, so an older part file is from a killed process
FULL = (errno.ENOSPC, errno.EDQUOT)
CURES = {
    **dict.fromkeys(FULL, "make room (or lift the quota)"),
    errno.EFBIG: "lift the limit on the size of a file (ulimit -f)",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "make the folder writable for this user"),
    errno.EROFS: "write to a disk that is not mounted read-only (save_dir of trainer.logger)",
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "move away the file that stands where a folder must be"),
}


class CheckpointNotWritten(OSError):
    """A checkpoint could not be written."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint IO that writes atomically.

    Lightning's own writes to the system's temporary folder and then moves the file, which is a copy if that is another
    disk. Here the bytes are written beside the checkpoint, synced to disk (fsync), and then renamed.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint; an existing one of the same name is kept until the new one is safe.

        Raises:
            CheckpointNotWritten: If it cannot be written; names the checkpoint, the reason and the cure.
        """
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(target, f".{os.getpid()}.part") as file:  # another process may write the same checkpoint
                file.write(buffer.getbuffer())
        except OSError as error:
            cure = CURES.get(error.errno or 0, "see to that")
            raise CheckpointNotWritten(
                f"the checkpoint {target} was not written: {error.strerror or error}."
                f"{_needed(target, buffer.getbuffer().nbytes) if error.errno in (*FULL, errno.EFBIG) else ''} "
                f"Earlier checkpoints are as they were: {cure} and resume from one of them"
            ) from error
        _clear(target)


def _needed(path: Path, size: int) -> str:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    return f" It needs {size / 1e6:,.1f} MB, the disk of {folder} has {free / 1e6:,.1f} MB left."


def _clear(path: Path) -> None:
    """Remove part files that killed processes left of a checkpoint that is now complete."""
    with suppress(OSError):  # another process may clear too; both times are from the disk, whose clock may differ
        whole = path.stat().st_mtime
        for part in path.parent.glob(f"{escape(path.name)}.*.part"):
            if whole - part.stat().st_mtime > ABANDONED:
                part.unlink()
