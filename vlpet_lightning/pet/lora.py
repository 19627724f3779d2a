"""LoRA (Hu et al., ICLR 2022), parallel to a frozen projection."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from vlpet_lightning.checks import positive
from vlpet_lightning.pet.unit import Unit


class LoRA(Unit):
    """``h + (alpha / rank) B A dropout(x)`` (src/lora/controller.py: LoRALinearController).

    Place it at a site whose input and output are those of one linear layer, e.g. ``encoder.attn.query``.

    Args:
        width: ``d``.
        rank: Rank of the update.
        alpha: The update is scaled by ``alpha / rank``.
        dropout: Dropout on the update's input during training.
    """

    def __init__(self, width: int, *, rank: int = 128, alpha: float = 32.0, dropout: float = 0.1) -> None:
        super().__init__()
        self.alpha = alpha
        self.scale = alpha / positive("rank", rank)
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(width, rank, bias=False)
        self.lora_B = nn.Linear(rank, width, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def map_to(self, width: int) -> None:
        self.lora_B = nn.Linear(self.lora_B.in_features, width, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return h + self.scale * self.lora_B(self.lora_A(self.dropout(x)))

    @property
    def is_identity(self) -> bool:
        return True

    def start_as_identity(self) -> None:
        nn.init.zeros_(self.lora_B.weight)

    @torch.no_grad()
    def merge(self, linear: nn.Linear, *, side: Literal["input", "output"] = "output") -> None:
        if side == "input":
            raise ValueError("LoRA cannot be merged at a site on the input of a layer: place it on the output")
        linear.weight += self.scale * self.lora_B.weight @ self.lora_A.weight

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"
