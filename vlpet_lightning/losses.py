"""Losses of the tasks, as sums and counts."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vlpet_lightning.batch import IGNORED


def loss_terms(logits: Tensor, labels: Tensor, kind: str, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the cross entropy of a batch as a sum and a count.

    Source: src/multitask_model.py, ``train_step`` of each task.

    Args:
        logits: ``(B, L, vocabulary)``.
        labels: ``(B, L)`` target ids, :data:`IGNORED` on padding. A sample without any target is not counted.
        kind: ``token`` averages over target tokens; ``sample`` averages the mean token loss over samples;
            ``weighted_sample`` also multiplies each sample's loss by its weight.
        weights: ``(B,)`` weights of the samples, or None.

    Returns:
        Scalars ``(total, count)``: the sum of losses, and the number of samples or target tokens.
    """
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    losses = losses.view_as(labels)
    real = labels != IGNORED
    if kind == "token":
        return losses.sum(), real.sum()
    tokens = real.sum(dim=1)
    samples = losses.sum(dim=1) / tokens.clamp(min=1)
    if kind == "weighted_sample" and weights is not None:
        samples = samples * weights
    return samples.sum(), (tokens > 0).sum()
