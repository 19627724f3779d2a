"""The batch passed from data modules to models, and the definitions of all shape symbols.

======  ==========================================================================
symbol  meaning
======  ==========================================================================
``B``   samples in the batch, all of one task
``T``   text tokens, right-padded to the longest in the batch
``N``   images per sample: 1, or 2 for NLVR2
``F``   feature vectors per image (49 for a 7x7 grid, 36 after pooling), or frames per clip
``D``   dimension of a feature vector (2048 for CLIP RN101)
``V``   visual tokens in the language model's input: ``N`` times the pooled grid
``S``   encoder length: ``T + V``, plus prompt tokens for methods that have them
``L``   target tokens, right-padded with -100
``d``   hidden dimension of the language model
``r``   rank (bottleneck dimension) of a PET module
======  ==========================================================================
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # label of positions without loss; the default of torch's cross_entropy


@dataclass
class Batch:
    """A batch of one task.

    Args:
        task: Key of :data:`vlpet_lightning.tasks.TASKS`.
        input_ids: ``(B, T)`` int64 token ids.
        features: ``(B, F, D)`` or ``(B, N, F, D)`` floating point feature vectors, pooled or not.
        text_mask: ``(B, T)`` bool, true on real tokens. If None, the model masks its padding token.
        feature_mask: ``(B, V)`` bool, true on image tokens to attend to. If None, all are attended to.
        boxes: Normalised ``x1 y1 x2 y2`` per vector, shaped like ``features`` with a last axis of 4. If None, zeros,
            as for all grid features.
        labels: ``(B, L)`` int64 target ids, :data:`IGNORED` on padding. None if there are no targets.
        weights: ``(B,)`` float loss weights (for VQA, scores of the sampled answers). None means 1.
        ids: ``B`` question ids, unique within a task and split.
        references: ``B`` references for the task's metric; empty in training.
        images: ``B`` tuples of image ids.
        texts: ``B`` input texts without the task prompt.
        store: Feature store that the features were read from, for error messages.
        rows: ``B`` tuples of row numbers of that store, one for each image.
    """

    task: str
    input_ids: Tensor
    features: Tensor
    text_mask: Tensor | None = None
    feature_mask: Tensor | None = None
    boxes: Tensor | None = None
    labels: Tensor | None = None
    weights: Tensor | None = None
    ids: list[str] = field(default_factory=list)
    references: list[Any] = field(default_factory=list)
    images: list[tuple[str, ...]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    store: str = ""
    rows: list[tuple[int, ...]] = field(default_factory=list)
    _targets: Tensor | None = field(default=None, init=False, repr=False, compare=False)  # of these labels

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def targets(self) -> Tensor:
        """Return the ``(P,)`` positions of real targets in the flattened labels.

        Their number depends on the values of the labels, so that computing them on a GPU would synchronise. Batches
        that are moved there bring them along.

        Raises:
            ValueError: If the batch has no labels.
        """
        if self._targets is not None:
            return self._targets
        if self.labels is None:
            raise ValueError(f"a batch of task {self.task!r} has no labels: they are required for logits and the loss")
        return (self.labels.flatten() != IGNORED).nonzero().squeeze(1)

    def _map(self, change: Any) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        moved = replace(self, **{name: change(t) for name, t in tensors.items() if isinstance(t, Tensor)})
        if self.labels is not None:
            moved._targets = change(self.targets())
        return moved

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with all tensors on ``device``; copies to a GPU are non-blocking."""
        to_gpu = torch.device(device).type == "cuda"
        return self._map(lambda tensor: tensor.to(device, non_blocking=to_gpu))

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory (called by a DataLoader with ``pin_memory=True``)."""
        return self._map(lambda tensor: tensor.pin_memory())
