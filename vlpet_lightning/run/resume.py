"""``--ckpt_path auto``: a requeued run resumes in its own folder from its newest checkpoint."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.fabric.utilities.rank_zero import rank_zero_only
from rich.console import Console

from vlpet_lightning.run.folder import CHECKPOINTS, FOLDER, folder_of, has_folder

RUN = "VLPET_RUN"  # environment variable: name of the run
RECORD = "VLPET_RUN_RECORD"  # environment variable: file that receives the run's folder, for the launcher
AUTO = "auto"
RESUMABLE = ("resume.ckpt", "last.ckpt")
SPECIAL = ("best", "last", "hpc")  # Lightning's keywords for checkpoints
NAME = re.compile(r"(?!\.+$)[A-Za-z0-9._-]+")  # valid name for a folder and for a W&B run


def run_name(environment: Mapping[str, str] = os.environ) -> str:
    """Return a run name that stays the same at every restart.

    Raises:
        ValueError: If neither the user nor SLURM gives a name, or the user's is not valid for a folder and for W&B.
    """
    name = environment.get(RUN)
    if name:
        if NAME.fullmatch(name) is None:
            raise ValueError(
                f"the environment variable {RUN} is {name!r}, and a run's name may hold letters (A-Z), digits, "
                "., _ and - alone: set another"
            )
        return name
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"job_{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    if "SLURM_JOB_ID" in environment:
        return f"job_{environment['SLURM_JOB_ID']}"
    raise ValueError(
        f"--ckpt_path {AUTO} must know which run to resume, and this is no SLURM job: set the environment variable "
        f"{RUN} to a name that stays the same"
    )


def newest_checkpoint(folder: Path) -> str | None:
    """Return the checkpoint to resume from; None if there is none yet."""
    found = [path for name in RESUMABLE if (path := folder / name).is_file()]
    return str(max(found, key=lambda path: path.stat().st_mtime_ns)) if found else None


def check_ckpt_path(config: Any, subcommand: str) -> None:
    """Refuse a missing checkpoint before anything else is read; ``auto`` of ``fit`` is left to :func:`resolve`.

    Args:
        config: Config of the subcommand.
        subcommand: Name of the subcommand.

    Raises:
        ValueError: If ``auto`` is given to a subcommand that does not resume.
        FileNotFoundError: If there is no checkpoint at the given path.
    """
    path = config.get("ckpt_path")
    if path == AUTO:
        if subcommand == "fit":
            return
        raise ValueError(
            f"--ckpt_path {AUTO} is for fit, which resumes from it: give {subcommand} the checkpoint itself, "
            f"such as {folder_of(loggers_of(config), 'NAME') / CHECKPOINTS / 'last.ckpt'}"
        )
    if path is None or path in SPECIAL or path.startswith("registry") or not _is_local_file_protocol(path):
        return
    if not Path(path).exists():  # some strategies write a folder
        others = sorted(other.name for other in Path(path).absolute().parent.glob("*.ckpt"))
        raise FileNotFoundError(
            f"no checkpoint {path}: "
            + (f"its folder has {', '.join(others)}" if others else "see checkpoints in the folder of the run")
        )


def loggers_of(config: Any) -> list[Any]:
    """Return the config nodes of a subcommand's loggers; the first names the run's folder.

    Raises:
        ValueError: If the first logger has no folder per run.
    """
    loggers = config.trainer.logger
    loggers = [one for one in (loggers if isinstance(loggers, list) else [loggers]) if hasattr(one, "init_args")]
    if loggers and loggers[0].class_path.endswith(".WandbLogger"):
        raise ValueError(
            "trainer.logger begins with a WandbLogger, which has no folder for a run: the config, predictions and "
            "checkpoints of all runs would meet in one. Put vlpet_lightning.loggers.CSVLog before it"
        )
    return loggers


def check_dirpaths(callbacks: Any, folder: Path) -> None:
    """Refuse a run whose checkpoints go to a folder where ``auto`` would not find them.

    Args:
        callbacks: Config nodes of the callbacks.
        folder: Folder of this run's checkpoints.

    Raises:
        ValueError: If there is such a ``dirpath``; names it.
    """
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    given = [one.init_args for one in callbacks if hasattr(one, "init_args")]
    found = [one for one in given if "dirpath" in one and "save_last" in one]  # ModelCheckpoint and its subclasses
    elsewhere = [one for one in found if one.dirpath and os.path.realpath(one.dirpath) != os.path.realpath(folder)]
    names = {f"{one.get('filename')}.ckpt" for one in found if one not in elsewhere}
    names |= {"last.ckpt" for one in found if one not in elsewhere and one.save_last}
    if elsewhere and names.isdisjoint(RESUMABLE):
        raise ValueError(
            f"--ckpt_path {AUTO} looks into {folder}, and a ModelCheckpoint of trainer.callbacks has the dirpath "
            f"{elsewhere[0].dirpath}, which all runs would share: leave dirpath out, or give the path of a checkpoint"
        )


@rank_zero_only
def announce(folder: Path, checkpoint: str | None) -> None:
    """Print, once for all ranks, whether the run resumes or starts anew; warn of checkpoints that ``auto`` ignores."""
    wanted = " or ".join(RESUMABLE)
    text = f"begins: no {wanted} in {folder}" if checkpoint is None else f"resumes from {checkpoint}"
    Console(stderr=True).print(text, soft_wrap=True, markup=False, highlight=False)
    others = sorted(path.name for path in folder.glob("*.ckpt")) if checkpoint is None else []
    if others:
        warnings.warn(
            f"{folder} has {', '.join(others)}, from which --ckpt_path {AUTO} does not resume: it is not {wanted}. "
            "The run starts anew; set filename: last or resume in a ModelCheckpoint, or give a path",
            stacklevel=2,
        )


def resolve(config: Any) -> Path:
    """Set the run's name in its loggers, and replace ``auto`` by the newest checkpoint.

    Args:
        config: Config of a subcommand; changed in place.

    Returns:
        The run's folder.

    Raises:
        ValueError: If the first logger has no folder per run, the run has no name, or its checkpoints go elsewhere.
    """
    loggers = loggers_of(config)
    if not loggers:
        raise ValueError(
            f"--ckpt_path {AUTO} looks into the folder of trainer.logger's first logger, and there is none: "
            "give a logger, or the path of a checkpoint"
        )
    if not has_folder(loggers[0]):
        raise ValueError(
            f"--ckpt_path {AUTO} looks into the folder of trainer.logger's first logger, and "
            f"{loggers[0].class_path.rpartition('.')[2]} has none that is named by {', '.join(FOLDER)}: put "
            "vlpet_lightning.loggers.CSVLog before it, or give the path of a checkpoint"
        )
    for logger in loggers:
        named = [logger.init_args.get(name) for name in ("version", "id")]  # W&B accepts its run id under both names
        if "version" in logger.init_args and named == [None, None]:
            logger.init_args.version = run_name()
        if "resume" in logger.init_args and logger.init_args.resume is None:
            logger.init_args.resume = "allow"  # LightningCLI's null would override WandbLogger's default and start anew
    folder = folder_of(loggers, "")
    check_dirpaths(config.trainer.get("callbacks"), folder / CHECKPOINTS)
    config.ckpt_path = newest_checkpoint(folder / CHECKPOINTS)
    if os.environ.get(RECORD):
        Path(os.environ[RECORD]).write_text(f"{folder.absolute()}\n")
    return folder
