"""Parameter counts at the start of a run: printed, logged and saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console

from vlpet_lightning.parameters import ParameterReport, count_parameters


class ParameterCount(Callback):
    """Print the table of parameters, log its figures and write ``parameters.json`` to the run folder.

    Args:
        print_table: Whether to print the table.
    """

    def __init__(self, print_table: bool = True) -> None:
        self.print_table = print_table

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log_dir = trainer.log_dir  # a collective operation: all ranks must call it
        if not trainer.is_global_zero:
            return
        report = count_parameters(pl_module.model)  # type: ignore[arg-type]
        if self.print_table:
            Console().print(report.table())
        figures = {f"parameters/{name}": getattr(report, name) for name in ("total", "trainable", "percent")}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)
            if isinstance(logger, WandbLogger):
                _log_table(logger, report, trainer.global_step)
        if log_dir is not None:
            folder = Path(log_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "parameters.json").write_text(json.dumps(report.as_dict(), indent=2) + "\n")


def _log_table(logger: WandbLogger, report: ParameterReport, step: int) -> None:
    rows: list[list[Any]] = [[name, count.trainable, count.total] for name, count in report.groups.items()]
    logger.log_table("parameters", columns=["group", "trainable", "total"], data=rows, step=step)
