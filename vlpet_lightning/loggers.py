"""A CSV logger that survives a restart."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Rows of a run's ``metrics.csv`` without their empty cells; none where there is no file."""
    path = folder / ExperimentWriter.NAME_METRICS_FILE
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


class CSVLog(CSVLogger):
    """Lightning's CSVLogger, which deletes an earlier ``metrics.csv`` of its folder, without the deleting.

    A resumed run, or a test after a fit, goes on in the same file. Steps that were taken again stand there twice: the
    later row is the one that counts. The file is written with every checkpoint, so that a run which goes on from one
    finds the rows before it.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            earlier = read_metrics(Path(self.log_dir))
            with warnings.catch_warnings():  # Lightning warns of what is undone below
                warnings.filterwarnings("ignore", message=".*will be deleted")
                writer = super().experiment
            if earlier:
                writer.metrics = [*earlier, *writer.metrics]
                writer.save()
        return self._experiment

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.save()
