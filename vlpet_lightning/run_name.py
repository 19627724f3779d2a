"""``--ckpt_path auto``: a run that was requeued goes on in its own folder, from its newest checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.cloud_io import _is_local_file_protocol

RUN = "VLPET_RUN"  # environment variable: the name of a run
RECORD = "VLPET_RUN_RECORD"  # environment variable: a file to write the run's folder to, for who started it
AUTO = "auto"
RESUMABLE = ("resume.ckpt", "last.ckpt")
FOLDER = ("save_dir", "name", "version")  # what a logger's folder of a run is made of
SPECIAL = ("best", "last", "hpc")  # Lightning's words for a checkpoint
NAME = re.compile(r"(?!\.+$)[A-Za-z0-9._-]+")  # of a folder, and of a run of W&B


def run_name(environment: Mapping[str, str] = os.environ) -> str:
    """A name that is the same whenever a run is started again.

    Raises:
        ValueError: If neither the user nor SLURM has given one, or the user's is no name for a folder and for W&B.
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
        f"--ckpt_path {AUTO} must know which run goes on, and this is no SLURM job: set the environment variable {RUN} "
        "to a name that stays the same"
    )


def newest_checkpoint(folder: Path) -> str | None:
    """The checkpoint to go on from; None before the first."""
    found = [path for name in RESUMABLE if (path := folder / name).is_file()]
    return str(max(found, key=lambda path: path.stat().st_mtime_ns)) if found else None


def check_ckpt_path(config: Any, subcommand: str) -> None:
    """Refuse a checkpoint that is not there, before anything else is read; ``auto`` of ``fit`` is for :func:`resolve`.

    Args:
        config: Of the subcommand.
        subcommand: Its name.

    Raises:
        ValueError: If a subcommand that does not resume is to find its checkpoint itself.
        FileNotFoundError: If there is none of that name.
    """
    path = config.get("ckpt_path")
    if path == AUTO:
        if subcommand == "fit":
            return
        raise ValueError(
            f"--ckpt_path {AUTO} is for fit, which goes on from there: give {subcommand} the checkpoint itself, "
            f"such as {_folder_of(loggers_of(config), 'NAME') / 'last.ckpt'}"
        )
    if path is None or path in SPECIAL or path.startswith("registry") or not _is_local_file_protocol(path):
        return
    if not Path(path).exists():  # a strategy may write a folder
        others = sorted(other.name for other in Path(path).absolute().parent.glob("*.ckpt"))
        raise FileNotFoundError(
            f"no checkpoint {path}: "
            + (f"its folder has {', '.join(others)}" if others else "see checkpoints in the folder of the run")
        )


def _folder_of(loggers: list[Any], version: str) -> Path:
    """Where a run's checkpoints are, in the folder of its first logger."""
    first = loggers[0].init_args if loggers else {}
    parts = (str(first.get(name) or "") for name in ("save_dir", "name"))
    return Path(*parts) / str(first.get("version") or version) / "checkpoints"


def loggers_of(config: Any) -> list[Any]:
    """The nodes of a subcommand's loggers, the one with the run's folder first.

    Raises:
        ValueError: If the first has no folder for a run.
    """
    loggers = config.trainer.logger
    loggers = [one for one in (loggers if isinstance(loggers, list) else [loggers]) if hasattr(one, "init_args")]
    if loggers and loggers[0].class_path.endswith(".WandbLogger"):
        raise ValueError(
            "trainer.logger begins with a WandbLogger, which has no folder for a run: the config, predictions and "
            "checkpoints of all runs would meet in one. Put vlpet_lightning.loggers.CSVLog before it"
        )
    return loggers


def resolve(config: Any) -> None:
    """Put the run's name into its loggers, and its newest checkpoint in the place of ``auto``.

    Args:
        config: Of a subcommand, changed in place.

    Raises:
        ValueError: If the first logger has no folder for a run, or the run no name.
    """
    loggers = loggers_of(config)
    if not loggers:
        raise ValueError(
            f"--ckpt_path {AUTO} looks into the folder of trainer.logger's first logger, and there is none: "
            "give a logger, or the path of a checkpoint"
        )
    first = loggers[0].init_args
    if not all(name in first for name in FOLDER):
        raise ValueError(
            f"--ckpt_path {AUTO} looks into the folder of trainer.logger's first logger, and "
            f"{loggers[0].class_path.rpartition('.')[2]} has none that is named by {', '.join(FOLDER)}: put "
            "vlpet_lightning.loggers.CSVLog before it, or give the path of a checkpoint"
        )
    for logger in loggers:
        named = [
            logger.init_args[name] for name in ("version", "id") if name in logger.init_args
        ]  # W&B's run id is both
        if "version" in logger.init_args and not any(name is not None for name in named):
            logger.init_args.version = run_name()
        if "resume" in logger.init_args and logger.init_args.resume is None:
            logger.init_args.resume = "allow"  # LightningCLI's null would undo WandbLogger's own: W&B would start anew
    folder = Path(first.save_dir) / str(first.name) / str(first.version)
    config.ckpt_path = newest_checkpoint(folder / "checkpoints")
    if os.environ.get(RECORD):
        Path(os.environ[RECORD]).write_text(f"{folder.absolute()}\n")
