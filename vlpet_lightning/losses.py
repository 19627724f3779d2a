"""The tasks' losses, as sums with what divides them."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vlpet_lightning.batch import IGNORED


def loss_terms(logits: Tensor, labels: Tensor, kind: str, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cross entropy of a batch, as a sum and a count (src/multitask_model.py: ``train_step`` of each task).

    Args:
        logits: ``(B, L, vocabulary)``.
        labels: ``(B, L)`` target ids, :data:`IGNORED` on padding. A sample without any target counts as absent.
        kind: ``token`` is the mean over target tokens; ``sample`` the mean over samples of their mean token loss;
            ``weighted_sample`` multiplies each sample's loss by its weight.
        weights: ``(B,)``, or None.

    Returns:
        ``(total, count)``, scalars: the sum of losses, and the number of samples or of target tokens.
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
