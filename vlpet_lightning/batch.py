"""What flows from the data modules into a model: the one place where shapes and their symbols are declared.

======  ==========================================================================
symbol  meaning
======  ==========================================================================
``B``   samples in the batch; all of one task
``T``   text tokens, right-padded to the longest of the batch
``N``   images of a sample: 1, or 2 for NLVR2
``F``   feature vectors of one image (49 for a 7x7 grid, 36 once pooled), or frames of a clip
``D``   width of a feature vector (2048 for CLIP RN101)
``V``   visual tokens the language model sees: ``N`` times the pooled grid
``S``   encoder length, ``T + V`` (and prompt tokens, where a method has them)
``L``   target tokens, right-padded with -100
``d``   width of the language model
``r``   rank (bottleneck width) of a PET module
======  ==========================================================================
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # label of a position that has no loss; torch's cross_entropy default


@dataclass
class Batch:
    """A batch of one task.

    Args:
        task: Name of a row of :data:`vlpet_lightning.tasks.TASKS`.
        input_ids: ``(B, T)`` int64 token ids.
        features: ``(B, F, D)`` or ``(B, N, F, D)`` floating point feature vectors, pooled or not.
        text_mask: ``(B, T)`` bool, true on real tokens. Left out, the model masks its padding token.
        feature_mask: ``(B, V)`` bool, true on image tokens that the model may see. Left out, it sees all of them.
        boxes: Normalised ``x1 y1 x2 y2`` per vector, shaped like ``features`` with a last axis of 4. Left out: zeros,
            as for every grid feature.
        labels: ``(B, L)`` int64 target ids, :data:`IGNORED` on padding. None where nothing is to be learnt.
        weights: ``(B,)`` float loss weight of each sample (the score of a drawn VQA answer). None means 1.
        ids: ``B`` question ids, unique within a task and split.
        references: ``B`` entries that the task's metric compares a prediction with; empty while training.
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

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def _map(self, change: Any) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(t) for name, t in tensors.items() if isinstance(t, Tensor)})

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on ``device``; towards a GPU without waiting for the copy."""
        to_gpu = torch.device(device).type == "cuda"
        return self._map(lambda tensor: tensor.to(device, non_blocking=to_gpu))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by a DataLoader with ``pin_memory=True``)."""
        return self._map(lambda tensor: tensor.pin_memory())
