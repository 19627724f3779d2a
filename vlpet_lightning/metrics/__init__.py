"""Metrics of predictions: pure functions, and torchmetrics classes that collect samples over batches and ranks."""

from vlpet_lightning.metrics.caption import caption_scores
from vlpet_lightning.metrics.exact_match import exact_match
from vlpet_lightning.metrics.multiple_choice import multiple_choice_scores
from vlpet_lightning.metrics.nlvr2 import nlvr2_scores
from vlpet_lightning.metrics.samples import (
    CaptionScores,
    ExactMatch,
    MultipleChoice,
    NLVR2Accuracy,
    SampleMetric,
    VQAAccuracy,
    gather_objects,
)
from vlpet_lightning.metrics.vqa import vqa_accuracy, vqa_accuracy_original, vqa_soft_score

__all__ = [
    "CaptionScores",
    "ExactMatch",
    "MultipleChoice",
    "NLVR2Accuracy",
    "SampleMetric",
    "VQAAccuracy",
    "caption_scores",
    "exact_match",
    "gather_objects",
    "multiple_choice_scores",
    "nlvr2_scores",
    "vqa_accuracy",
    "vqa_accuracy_original",
    "vqa_soft_score",
]
