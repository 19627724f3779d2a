"""torchmetrics classes for the pure functions; samples are collected by id, gathered over ranks and scored at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed
from torchmetrics import Metric

from vlpet_lightning.metrics.caption import DEFAULT, caption_scores, check_caption_metrics
from vlpet_lightning.metrics.exact_match import exact_match
from vlpet_lightning.metrics.groups import mean
from vlpet_lightning.metrics.multiple_choice import multiple_choice_scores
from vlpet_lightning.metrics.nlvr2 import nlvr2_scores
from vlpet_lightning.metrics.vqa import vqa_accuracy, vqa_accuracy_original, vqa_soft_score

Sample = tuple[str, str, Any]  # id, prediction, reference


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """Gather the value of every rank, in rank order; a list of the own value if nothing is distributed.

    Every rank must call this function.

    Args:
        value: Any picklable object.
        group: Process group of torch.distributed; None for all ranks.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(gathered, value, group=group)
    return gathered


class SampleMetric(Metric):
    """Base class of metrics that compare each sample's text with a reference.

    Ids, predictions and references are kept until :meth:`compute`. A repeated id (a distributed sampler pads the last
    batch) counts once, and the result is the same to the last digit for any number of ranks and any order. The samples
    are texts, which torchmetrics cannot gather as tensors; :meth:`_sync_dist` gathers objects instead.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    samples: list[Sample]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("samples", default=[], dist_reduce_fx=None)

    def update(self, ids: Sequence[str], predictions: Sequence[str], references: Sequence[Any]) -> None:
        """Add samples.

        Args:
            ids: ``B`` ids, unique within a task and split.
            predictions: ``B`` generated texts.
            references: ``B`` references.

        Raises:
            ValueError: If the lengths differ.
        """
        if not len(ids) == len(predictions) == len(references):
            raise ValueError(
                f"every sample needs an id, a prediction and a reference: got {len(ids)} ids, "
                f"{len(predictions)} predictions and {len(references)} references"
            )
        self.samples.extend(zip(ids, predictions, references, strict=True))

    def compute(self) -> dict[str, float]:
        """Return the scores by name, from 0 to 1 (CIDEr can be larger).

        Raises:
            ValueError: If there is no sample, or an id has two references.
        """
        if not self.samples:
            raise ValueError(f"{type(self).__name__} has no sample to score")
        return self.score(self._distinct())

    def score(self, samples: list[Sample]) -> dict[str, float]:
        """Score samples that are sorted by id and have unique ids."""
        raise NotImplementedError

    def _distinct(self) -> list[Sample]:
        distinct: dict[str, Sample] = {}
        # sorted by prediction too, so that the choice between two predictions does not depend on the ranks
        for sample in sorted(self.samples, key=lambda sample: sample[:2]):
            first = distinct.setdefault(sample[0], sample)
            if first[2] != sample[2]:
                raise ValueError(f"the id {sample[0]!r} stands for two samples: ids must be unique within a split")
        return list(distinct.values())

    def _sync_dist(self, dist_sync_fn: Callable | None = None, process_group: Any = None) -> None:
        ranks = gather_objects(self.samples, process_group or self.process_group)
        self.samples = [sample for samples in ranks for sample in samples]

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> Any:
        return super()._apply(fn, exclude_state=("samples", *exclude_state))  # texts have no device


def _has_labels(samples: list[Sample], score: str) -> bool:
    """Return whether any sample has an answer in its ``label``; if none has, warn that a score is left out."""
    if any(truth["label"] for _, _, truth in samples):
        return True
    warnings.warn(f"{score} left out: none of {len(samples)} samples has an answer in its label", stacklevel=3)
    return False


class VQAAccuracy(SampleMetric):
    """``accuracy`` (official evaluation), ``accuracy_original`` (the VL-PET repository's) and ``soft_score``.

    References are mappings with ``answers`` (human answers) and ``label`` (soft score by answer).

    >>> metric = VQAAccuracy()
    >>> metric.update(["1"], ["The net"], [{"answers": ["net"] * 9 + ["mesh"], "label": {"net": 1.0, "mesh": 0.3}}])
    >>> metric.compute()
    {'accuracy': 1.0, 'accuracy_original': 1.0, 'soft_score': 0.0}
    """

    def score(self, samples: list[Sample]) -> dict[str, float]:
        scores = {
            "accuracy": mean([vqa_accuracy(text, truth["answers"]) for _, text, truth in samples]),
            "accuracy_original": mean([vqa_accuracy_original(text, truth["answers"]) for _, text, truth in samples]),
        }
        if _has_labels(samples, "soft_score"):
            scores["soft_score"] = mean([vqa_soft_score(text, truth["label"]) for _, text, truth in samples])
        return scores


class ExactMatch(SampleMetric):
    """``accuracy``: share of predictions that exactly equal an answer in their reference's ``label`` (GQA).

    >>> metric = ExactMatch()
    >>> metric.update(["1", "2"], ["left", "Right"], [{"label": {"left": 1.0}}, {"label": {"right": 1.0}}])
    >>> metric.compute()
    {'accuracy': 0.5}
    """

    def score(self, samples: list[Sample]) -> dict[str, float]:
        if not _has_labels(samples, "accuracy"):
            return {}
        return {"accuracy": mean([exact_match(text, truth["label"]) for _, text, truth in samples])}


class MultipleChoice(SampleMetric):
    """``accuracy`` and ``well_formed`` of answers such as ``a2``.

    References are mappings with ``label`` and ``choices``, the number of choices.
    """

    def score(self, samples: list[Sample]) -> dict[str, float]:
        truths: list[Mapping[str, Any]] = [truth for _, _, truth in samples]
        return multiple_choice_scores(
            [text for _, text, _ in samples],
            [truth["label"] for truth in truths],
            [truth["choices"] for truth in truths],
        )


class NLVR2Accuracy(SampleMetric):
    """``accuracy`` and ``consistency`` of ``true`` / ``false`` predictions.

    References are mappings with ``label`` and ``identifier``.
    """

    def score(self, samples: list[Sample]) -> dict[str, float]:
        truths: list[Mapping[str, str]] = [truth for _, _, truth in samples]
        return nlvr2_scores(
            [text for _, text, _ in samples],
            [truth["label"] for truth in truths],
            [truth["identifier"] for truth in truths],
        )


class CaptionScores(SampleMetric):
    """Scores of :func:`~vlpet_lightning.metrics.caption_scores`; references are mappings with ``captions``.

    Args:
        metrics: As in :func:`~vlpet_lightning.metrics.caption_scores`.

    Raises:
        ValueError: If a metric is unknown.
    """

    def __init__(self, metrics: Sequence[str] = DEFAULT, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_caption_metrics(metrics)
        self.metrics = tuple(metrics)

    def score(self, samples: list[Sample]) -> dict[str, float]:
        predictions = {id: text for id, text, _ in samples}
        return caption_scores(predictions, {id: truth["captions"] for id, _, truth in samples}, self.metrics)
