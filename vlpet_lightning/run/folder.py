"""Output folder of a run: its training and the tests of its checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
FOLDER = ("save_dir", "name", "version")  # logger settings that make up a run's folder


def has_folder(logger: Any) -> bool:
    """Whether a logger, given as a config node, has a folder per run, as CSVLog does."""
    return all(name in logger.init_args for name in FOLDER)


def folder_of(loggers: list[Any], version: str) -> Path:
    """Return the folder of a run, as Lightning derives it from the first logger.

    Args:
        loggers: Loggers, as config nodes.
        version: Version used if the config gives none.
    """
    first = loggers[0].init_args if loggers else {}
    given = first.get("version")
    version = version if given is None else f"version_{given}" if isinstance(given, int) else given
    return Path(*(str(first.get(name) or "") for name in ("save_dir", "name")), version)


def run_folder(checkpoint: Path) -> Path:
    """Return the run's folder: ``runs/NAME/version_0`` of ``runs/NAME/version_0/checkpoints/last.ckpt``."""
    return checkpoint.absolute().parent.parent


def check_free(logger: Any) -> None:
    """Check that a new training does not start in the folder of an existing run.

    Args:
        logger: Config node of the logger that names the folder.

    Raises:
        ValueError: If the folder holds checkpoints.
    """
    if not has_folder(logger) or logger.init_args.version is None or int(os.environ.get("LOCAL_RANK", 0)):
        return  # only the first rank checks; others start later
    folder = folder_of([logger], "")
    if any((folder / CHECKPOINTS).glob("*.ckpt")):
        raise ValueError(
            f"{folder} already holds a run: resume it by --ckpt_path {folder / CHECKPOINTS}/last.ckpt, give "
            "another trainer.logger.init_args.version, or remove it"
        )


def go_into_run(logger: Any, checkpoint: str | None) -> None:
    """Direct the results of evaluating a checkpoint into its run's folder, unless the user gave another folder.

    Args:
        logger: Config node of the logger that names the folder; changed in place.
        checkpoint: Path of the checkpoint.
    """
    if checkpoint is None or not has_folder(logger) or logger.init_args.version is not None:
        return
    run = Path(checkpoint).parent.parent
    run = run if len(run.parts) > 2 else run.absolute()
    if Path(checkpoint).parent.name == CHECKPOINTS and (run / CONFIG).is_file():
        logger.init_args.save_dir = str(run.parent.parent)
        logger.init_args.name, logger.init_args.version = run.parent.name, run.name


def warn_if_untrained(config: Any) -> None:
    """Warn that units are untrained if neither a checkpoint nor exported weights are given."""
    if config.ckpt_path is None and config.model.init_args.get("pet_weights") is None:
        rank_zero_warn(
            "no --ckpt_path and no model.init_args.pet_weights: what is scored is the model before any training",
            category=UserWarning,
        )
