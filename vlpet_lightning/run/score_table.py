"""Print the scores at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from vlpet_lightning.published.table import main_scores, print_scores
from vlpet_lightning.run.protocol_log import record_of

STAGES = {"fit": "val", "validate": "val", "test": "test"}


class ScoreTable(Callback):
    """Print the scores of each task after ``test``, ``validate`` and the last validation of ``fit``.

    The published row of the same method and backbone is beside them, marked as such, with the reasons if the two
    cannot be compared. The command line adds this callback to every run. Only rank 0 prints.
    """

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the table; progress bars have ended by now, and a run that failed does not come here."""
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False) or stage not in STAGES:
            return
        found = scores_of(pl_module, STAGES[stage])
        if main_scores(found):
            print_scores(Console(), record_of(trainer), found, STAGES[stage])


def scores_of(pl_module: Any, stage: str) -> dict[str, Mapping[str, float]]:
    """Return the module's scores of a stage by task."""
    scores: Mapping[str, Mapping[str, float]] = getattr(pl_module, "scores", {})
    parts = {name: tuple(name.partition("/")[::2]) for name in scores}
    return {task: scores[name] for name, (where, task) in parts.items() if where == stage}
