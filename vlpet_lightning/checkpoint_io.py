"""Checkpoints that are there in whole or not at all."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol

from vlpet_lightning.whole_file import whole_file


class CheckpointNotWritten(OSError):
    """A disk did not take a checkpoint."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's, which writes below the system's temporary folder and moves: a copy where that is another disk.

    Here the bytes go beside the checkpoint, to the disk itself (fsync), and then take its name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint; an older one of that name stays until the new one is safe.

        Raises:
            CheckpointNotWritten: Names the disk.
        """
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(target) as file:
                file.write(buffer.getbuffer())
        except OSError as error:
            needed = buffer.getbuffer().nbytes / 1e6
            raise CheckpointNotWritten(
                f"the checkpoint {target} was not written: {error.strerror}. It needs {needed:,.1f} MB, "
                f"{_free(target)}. Earlier checkpoints are as they were: make room (or lift the quota) and resume "
                "from one of them"
            ) from error


def _free(path: Path) -> str:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    return f"the disk of {folder} has {shutil.disk_usage(folder).free / 1e6:,.1f} MB left"
