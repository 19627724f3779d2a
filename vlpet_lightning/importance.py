"""Importance of a language model's weights: squared gradients of its text-only loss on training samples.

This follows the released code of Ladder Side-Tuning (VL-T5/src/pruning/fisher.py: calculate_the_importance_label): one
sample at a time, without dropout, without images, with the mean loss of the sample's target tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from vlpet_lightning.batch import IGNORED, Batch


@dataclass
class Measured:
    """Importance of weights, summed over samples.

    Args:
        channels: ``(d,)`` importance of the token embedding's channels, summed over the vocabulary.
        weights: Importance of the weights by name, in their shapes.
        samples: Number of samples by task.
        loss: Mean loss of the samples.
    """

    channels: Tensor
    weights: dict[str, Tensor]
    samples: dict[str, int] = field(default_factory=dict)
    loss: float = 0.0


def samples_of(batches: Iterable[Batch], pad: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Take batches apart: task, ``(1, T)`` token ids and ``(1, L)`` labels of each sample, without padding.

    Args:
        batches: Batches with labels; features are ignored.
        pad: Padding token.
    """
    for batch in batches:
        real = batch.input_ids != pad if batch.text_mask is None else batch.text_mask
        assert batch.labels is not None  # those of a training loader
        for ids, mask, labels in zip(batch.input_ids, real, batch.labels, strict=True):
            yield batch.task, ids[mask][None], labels[labels != IGNORED][None]


def measure_importance(
    lm: Any,
    embedding: Tensor,
    names: Collection[str],
    batches: Iterable[Batch],
    samples: int,
    advance: Callable[[], Any] = lambda: None,
) -> Measured:
    """Measure the importance of weights.

    Args:
        lm: Language model; its ``requires_grad`` flags change, its weights do not.
        embedding: Its token embedding, ``(vocabulary, d)``.
        names: Names of the weights.
        batches: Training batches.
        samples: Number of samples; fewer if the batches end before.
        advance: Called after each sample.

    Returns:
        Sums of squared gradients on the CPU.

    Raises:
        ValueError: If a loss is not finite, or there are no samples.
    """
    lm.eval().requires_grad_(False)
    weights = {name: parameter for name, parameter in lm.named_parameters() if name in names}
    watched = [parameter.requires_grad_() for parameter in (*weights.values(), embedding)]
    sums = [torch.zeros_like(parameter) for parameter in watched]
    counts: dict[str, int] = {}
    total = 0.0
    for task, ids, labels in islice(samples_of(batches, lm.config.pad_token_id), samples):
        loss = lm(input_ids=ids.to(embedding.device), labels=labels.to(embedding.device)).loss
        if not loss.isfinite():
            raise ValueError(f"the loss of a sample of {task} is {loss.item()}: check the backbone's weights")
        for found, gradient in zip(sums, torch.autograd.grad(loss, watched), strict=True):
            found.addcmul_(gradient, gradient)
        counts[task] = counts.get(task, 0) + 1
        total += loss.item()
        advance()
    if not counts:
        raise ValueError("there are no training samples: check the data of the config")
    channels = sums.pop().sum(dim=0).cpu()
    important = {name: tensor.cpu() for name, tensor in zip(weights, sums, strict=True)}
    return Measured(channels, important, counts, total / sum(counts.values()))
