"""Scores of the tasks with right or wrong answers: VQA, GQA and NLVR2."""

from __future__ import annotations

from callbacks.task_metrics import TaskMetrics
from vlpet_lightning.metrics import ExactMatch, NLVR2Accuracy, SampleMetric, VQAAccuracy


class VQAMetrics(TaskMetrics):
    """Log, in percent:

    - ``vqa/accuracy`` (official evaluation), ``vqa/accuracy_original`` (the VL-PET repository's), ``vqa/soft_score``;
    - ``gqa/accuracy``: exact match;
    - ``nlvr2/accuracy``, ``nlvr2/consistency``.
    """

    def make_metrics(self, stage: str) -> dict[str, SampleMetric]:
        return {"vqa": VQAAccuracy(), "gqa": ExactMatch(), "nlvr2": NLVR2Accuracy()}
