"""Scores of the video tasks: TVQA, How2QA, TVC and YC2C."""

from __future__ import annotations

from callbacks.task_metrics import TaskMetrics
from vlpet_lightning.metrics import CaptionScores, MultipleChoice, SampleMetric
from vlpet_lightning.metrics.caption import check_caption_metrics


class VideoMetrics(TaskMetrics):
    """Log, in percent:

    - ``tvqa/accuracy``, ``how2qa/accuracy``: exact match of the choice;
    - ``tvqa/well_formed``, ``how2qa/well_formed``: share of answers that name a choice;
    - ``tvc/cider``, ``yc2c/cider``, times 100; the scored items are set by the data module's ``caption_items``.

    Args:
        caption_metrics: Any of ``cider``, ``bleu``, ``rouge_l`` and ``meteor``; the benchmark uses only CIDEr.

    Raises:
        ValueError: If a metric is unknown.
    """

    def __init__(self, caption_metrics: list[str] | None = None) -> None:
        super().__init__()
        self.caption_metrics = ["cider"] if caption_metrics is None else caption_metrics
        check_caption_metrics(self.caption_metrics)

    def make_metrics(self, stage: str) -> dict[str, SampleMetric]:
        captions: dict[str, SampleMetric] = {name: CaptionScores(self.caption_metrics) for name in ("tvc", "yc2c")}
        return {"tvqa": MultipleChoice(), "how2qa": MultipleChoice(), **captions}
