"""Base class of callbacks that score predictions over a whole epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from vlpet_lightning.batch import Batch
from vlpet_lightning.metrics import SampleMetric, gather_objects


def predictions_of(outputs: Any, batch: Batch) -> list[str]:
    """Return the predictions of an evaluation step.

    Raises:
        ValueError: If the step did not return one prediction per sample.
    """
    found = outputs.get("predictions") if isinstance(outputs, Mapping) else None
    if found is None or len(found) != len(batch.ids):
        got = f"{len(found)} predictions" if found is not None else f"{type(outputs).__name__} without predictions"
        raise ValueError(
            f"an evaluation step must return {{'predictions': [one text per sample]}}; for {len(batch.ids)} samples of "
            f"task {batch.task} it returned {got}"
        )
    return list(found)


def _scores(pl_module: LightningModule) -> dict[str, dict[str, float]]:
    return cast("dict[str, dict[str, float]]", pl_module.scores)


class TaskMetrics(Callback):
    """Collect the predictions of the callback's tasks and log their scores as ``{stage}/{task}/{metric}``, in percent.

    The stage is ``val`` or ``test``. The scores are also stored in ``pl_module.scores["{stage}/{task}"]``, from which
    the module computes the average over tasks. Tasks without samples in an epoch, or without references, are left out.
    Nothing is scored during the sanity check. Every rank scores the samples of all ranks.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, SampleMetric] = {}

    def make_metrics(self, stage: str) -> dict[str, SampleMetric]:
        """Create a new metric for each of the callback's tasks."""
        raise NotImplementedError

    def _start(self, pl_module: LightningModule, stage: str) -> None:
        self._metrics = self.make_metrics(stage)
        for task in self._metrics:
            _scores(pl_module).pop(f"{stage}/{task}", None)  # scores of the last epoch must not pass for this one's

    def _collect(self, trainer: Trainer, outputs: Any, batch: Batch) -> None:
        metric = self._metrics.get(batch.task)
        if metric is None or trainer.sanity_checking or not batch.references:
            return
        metric.update(batch.ids, predictions_of(outputs, batch), batch.references)

    def _finish(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.sanity_checking:
            return
        # a rank may have no sample of a task that other ranks have; all must agree on what to gather next
        seen = set().union(*gather_objects({task for task, metric in self._metrics.items() if metric.samples}))
        for task in sorted(seen):
            metric = self._metrics[task]
            metric.update([], [], [])  # marks the metric as updated on this rank for torchmetrics
            scores = {name: 100.0 * value for name, value in metric.compute().items()}
            _scores(pl_module)[f"{stage}/{task}"] = scores
            # all ranks have the same numbers; their maximum is exact, their mean may not be
            named = {f"{stage}/{task}/{name}": value for name, value in scores.items()}
            pl_module.log_dict(named, sync_dist=True, reduce_fx="max", batch_size=1)
        self._metrics = {}  # frees the samples of a large split

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module, "val")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module, "test")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect(trainer, outputs, batch)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect(trainer, outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, pl_module, "test")
