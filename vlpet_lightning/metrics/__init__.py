"""Metrics of predictions: pure functions, and torchmetrics classes that collect samples over batches and ranks."""

from importlib import import_module
from typing import TYPE_CHECKING

from vlpet_lightning.metrics.caption import caption_scores
from vlpet_lightning.metrics.exact_match import exact_match
from vlpet_lightning.metrics.multiple_choice import multiple_choice_scores
from vlpet_lightning.metrics.nlvr2 import nlvr2_scores
from vlpet_lightning.metrics.vqa import vqa_accuracy, vqa_accuracy_original, vqa_soft_score

if TYPE_CHECKING:
    from vlpet_lightning.metrics.samples import (
        CaptionScores,
        ExactMatch,
        MultipleChoice,
        NLVR2Accuracy,
        SampleMetric,
        VQAAccuracy,
        gather_objects,
    )


def __getattr__(name: str) -> object:
    # the pure functions need no torchmetrics, whose import takes seconds
    if name in __all__:
        return getattr(import_module("vlpet_lightning.metrics.samples"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
