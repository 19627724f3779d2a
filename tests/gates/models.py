"""Tiny models with gates whose factors all differ, and batches for them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tests.runs import make_batch, placements
from vlpet_lightning import Batch, VLModel
from vlpet_lightning.pet import FullGate, LargeGate, MiddleXGate, MiddleYGate, SmallGate

KINDS = ("bart", "t5")
GATES: dict[str, Any] = {
    "large": partial(LargeGate, rank=8),
    "full": FullGate,
    "middleX": MiddleXGate,
    "middleY": MiddleYGate,
    "middleY of the paper": partial(MiddleYGate, form="paper"),
    "small": SmallGate,
}


def batch_of(kind: str, task: str = "vqa", seed: int = 0) -> Batch:
    """Return a batch whose last sample has two positions of padding."""
    batch = make_batch(task, 3, seed)
    if kind == "bart":
        return batch
    words = batch.input_ids.clone()
    words[:, 0] = 5  # T5 pads with 0 and ends with 1
    words[-1, 4:] = torch.tensor([1, 0, 0])
    return replace(batch, input_ids=words)


def with_gate(models: Any, kind: str, gate: str) -> VLModel:
    """Return a model with a gate in every encoder layer."""
    return models(kind, placements(gate=GATES[gate]))
