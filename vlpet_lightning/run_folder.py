"""The folder of a run: one training, and what was tested of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"


def run_folder(checkpoint: Path) -> Path:
    """``runs/NAME/version_0`` of ``runs/NAME/version_0/checkpoints/last.ckpt``."""
    return checkpoint.absolute().parent.parent


def check_free(logger: Any) -> None:
    """Check that a training that begins anew does not do so in the folder of another.

    Args:
        logger: The node of the logger that names the folder.

    Raises:
        ValueError: If there are checkpoints.
    """
    version = logger.init_args.get("version")
    if version is None or int(os.environ.get("LOCAL_RANK", 0)):  # other ranks come later
        return
    folder = Path(logger.init_args.save_dir) / str(logger.init_args.name) / str(version)
    if any((folder / CHECKPOINTS).glob("*.ckpt")):
        raise ValueError(
            f"{folder} holds a run already: go on with it by --ckpt_path {folder / CHECKPOINTS}/last.ckpt, give "
            "another trainer.logger.init_args.version, or remove it"
        )


def go_into_run(logger: Any, checkpoint: str | None) -> None:
    """Let what is scored of a checkpoint go into its run's folder, where the user has not named another.

    Args:
        logger: The node of the logger that names the folder, changed in place.
        checkpoint: The checkpoint.
    """
    if checkpoint is None or logger.init_args.get("version") is not None:
        return
    run = Path(checkpoint).parent.parent
    run = run if len(run.parts) > 2 else run.absolute()
    if Path(checkpoint).parent.name == CHECKPOINTS and (run / CONFIG).is_file():
        logger.init_args.save_dir = str(run.parent.parent)
        logger.init_args.name, logger.init_args.version = run.parent.name, run.name


def warn_if_untrained(config: Any) -> None:
    """Say that units are as they start, where neither a checkpoint nor exported weights are given."""
    if config.ckpt_path is None and config.model.init_args.get("pet_weights") is None:
        rank_zero_warn(
            "no --ckpt_path and no model.init_args.pet_weights: what is scored is the model before any training",
            category=UserWarning,
        )
