"""Scores of generated captions."""

from __future__ import annotations

from callbacks.task_metrics import TaskMetrics
from vlpet_lightning.metrics import CaptionScores, SampleMetric
from vlpet_lightning.metrics.caption import DEFAULT, check_caption_metrics


class CaptionMetrics(TaskMetrics):
    """Logs ``caption/cider``, ``caption/bleu1`` to ``bleu4``, ``caption/rouge_l`` and ``caption/meteor``, times 100.

    Args:
        metrics: Any of ``cider``, ``bleu``, ``rouge_l``, ``meteor`` and ``spice``; None for all but ``spice``, which
            downloads Stanford CoreNLP at first use. METEOR takes most of the time.
        val_metrics: Metrics computed in validation, e.g. fewer for speed; None for those of ``metrics``.

    Raises:
        ValueError: If a metric is unknown.
    """

    def __init__(self, metrics: list[str] | None = None, val_metrics: list[str] | None = None) -> None:
        super().__init__()
        self.metrics = list(DEFAULT) if metrics is None else metrics
        self.val_metrics = self.metrics if val_metrics is None else val_metrics
        check_caption_metrics(self.metrics)
        check_caption_metrics(self.val_metrics)

    def make_metrics(self, stage: str) -> dict[str, SampleMetric]:
        return {"caption": CaptionScores(self.val_metrics if stage == "val" else self.metrics)}
