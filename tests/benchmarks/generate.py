"""Greedy and beam search of this library against ``generate`` of transformers on the same model.

``python -m tests.benchmarks generate [--kinds bart t5] [--beams 1 5] [--batch 16] [--json]``

Random weights do not end an answer early, so that all answers have the maximum length. ``--early`` forces every sample
to end at its own length, like real captions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from vlpet_lightning.batch import Batch
from vlpet_lightning.model import VLModel


@torch.no_grad()
def stock_generate(model: VLModel, batch: Batch, beams: int, length: int, **changes: Any) -> Tensor:
    """Generate with the language model's own ``generate``, from this library's encoder states."""
    config = model.backbone.generation(model.lm.config, beams, length)
    for name, value in changes.items():
        setattr(config, name, value)
    states = BaseModelOutput(last_hidden_state=model.encode(batch))  # type: ignore[arg-type]
    return model.lm.generate(encoder_outputs=states, attention_mask=model.mask(batch), generation_config=config)
