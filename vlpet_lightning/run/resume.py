"""``--ckpt_path auto``: a run that was requeued goes on in its own folder, from its newest checkpoint."""

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

RUN = "VLPET_RUN"  # environment variable: the name of a run
RECORD = "VLPET_RUN_RECORD"  # environment variable: a file to write the run's folder to, for who started it
AUTO = "auto"
RESUMABLE = ("resume.ckpt", "last.ckpt")
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
            f"such as {folder_of(loggers_of(config), 'NAME') / CHECKPOINTS / 'last.ckpt'}"
        )
    if path is None or path in SPECIAL or path.startswith("registry") or not _is_local_file_protocol(path):
        return
    if not Path(path).exists():  # a strategy may write a folder
        others = sorted(other.name for other in Path(path).absolute().parent.glob("*.ckpt"))
        raise FileNotFoundError(
            f"no checkpoint {path}: "
            + (f"its folder has {', '.join(others)}" if others else "see checkpoints in the folder of the run")
        )


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


def check_dirpaths(callbacks: Any, folder: Path) -> None:
    """Refuse a run that ``auto`` would begin anew, since it writes what can be resumed to where nobody looks.

    Args:
        callbacks: Their nodes.
        folder: Where this run's checkpoints are.

    Raises:
        ValueError: Names the ``dirpath``.
    """
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    given = [one.init_args for one in callbacks if hasattr(one, "init_args")]
    found = [one for one in given if "dirpath" in one and "save_last" in one]  # ModelCheckpoints and their kin
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
    """Say, once for all ranks, where a run goes on or that it begins; warn of checkpoints that are not gone on from."""
    wanted = " or ".join(RESUMABLE)
    text = f"begins: no {wanted} in {folder}" if checkpoint is None else f"goes on from {checkpoint}"
    Console(stderr=True).print(text, soft_wrap=True, markup=False, highlight=False)
    others = sorted(path.name for path in folder.glob("*.ckpt")) if checkpoint is None else []
    if others:
        warnings.warn(
            f"{folder} has {', '.join(others)}, from which --ckpt_path {AUTO} does not go on, as it is not {wanted}: "
            "the run begins anew; set save_last: true or filename: resume in a ModelCheckpoint, or give a path",
            stacklevel=2,
        )


def resolve(config: Any) -> Path:
    """Put the run's name into its loggers, and its newest checkpoint in the place of ``auto``.

    Args:
        config: Of a subcommand, changed in place.

    Returns:
        The run's folder.

    Raises:
        ValueError: If the first logger has no folder for a run, the run has no name, or its checkpoints go elsewhere.
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
        named = [logger.init_args.get(name) for name in ("version", "id")]  # W&B's run id goes by both names
        if "version" in logger.init_args and named == [None, None]:
            logger.init_args.version = run_name()
        if "resume" in logger.init_args and logger.init_args.resume is None:
            logger.init_args.resume = "allow"  # LightningCLI's null would undo WandbLogger's own: W&B would start anew
    folder = folder_of(loggers, "")
    check_dirpaths(config.trainer.get("callbacks"), folder / CHECKPOINTS)
    config.ckpt_path = newest_checkpoint(folder / CHECKPOINTS)
    if os.environ.get(RECORD):
        Path(os.environ[RECORD]).write_text(f"{folder.absolute()}\n")
    return folder
