"""``--ckpt_path auto``: a run that was requeued goes on in its own folder, from its newest checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RUN = "VLPET_RUN"  # environment variable: the name of a run
RECORD = "VLPET_RUN_RECORD"  # environment variable: a file to write the run's folder to, for who started it
AUTO = "auto"
RESUMABLE = ("resume.ckpt", "last.ckpt")


def run_name(environment: Mapping[str, str] = os.environ) -> str:
    """A name that is the same whenever a run is started again.

    Raises:
        ValueError: If neither the user nor SLURM has given one.
    """
    if environment.get(RUN):
        return environment[RUN]
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
        ValueError: If there is no logger with a folder of its own, or no name.
    """
    loggers = loggers_of(config)
    if not loggers:
        raise ValueError(
            f"--ckpt_path {AUTO} looks into the folder of trainer.logger's first logger, and there is none: "
            "give a logger, or the path of a checkpoint"
        )
    for logger in loggers:
        if logger.init_args.get("version") is None and logger.init_args.get("id") is None:  # two names of W&B's run id
            logger.init_args.version = run_name()
        if "resume" in logger.init_args and logger.init_args.resume is None:
            logger.init_args.resume = "allow"  # LightningCLI's null would undo WandbLogger's own: W&B would start anew
    first = loggers[0].init_args
    folder = Path(first.save_dir) / str(first.name) / str(first.version)
    config.ckpt_path = newest_checkpoint(folder / "checkpoints")
    if os.environ.get(RECORD):
        Path(os.environ[RECORD]).write_text(f"{folder.absolute()}\n")
