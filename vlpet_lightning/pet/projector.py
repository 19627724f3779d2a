"""Low-rank visual projection with an optional gate: an ablation (src/modeling_bart.py: LowRankVisualEmbedding)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlpet_lightning.checks import positive
from vlpet_lightning.pet.unit import linear


class LowRankProjector(nn.Module):
    """Projection ``up(gelu(down(f)))`` in place of the ``D x d`` linear layer, optionally gated by the features.

    Args:
        inputs: Width ``D`` of a feature vector.
        width: Output width ``d``.
        rank: Bottleneck width.
        gate_rank: Bottleneck width of the gate ``G = sigmoid(W_u gelu(W_d f))``; None disables the gate.
        residual: Multiply by ``1 + G`` instead of ``G``.
    """

    def __init__(
        self, inputs: int, width: int, *, rank: int = 96, gate_rank: int | None = None, residual: bool = False
    ) -> None:
        super().__init__()
        self.residual = residual
        self.down = linear(inputs, positive("rank", rank))
        self.up = linear(rank, width)
        gated = gate_rank is not None
        self.gate_down = linear(inputs, positive("gate_rank", gate_rank)) if gated else None  # type: ignore[arg-type]
        self.gate_up = linear(gate_rank, width) if gated else None  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        projected = self.up(F.gelu(self.down(features), approximate="tanh"))
        if self.gate_down is None or self.gate_up is None:
            return projected
        gate = torch.sigmoid(self.gate_up(F.gelu(self.gate_down(features), approximate="tanh")))
        return projected * (1 + gate) if self.residual else projected * gate
