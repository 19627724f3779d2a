"""Adapters with low-rank projections (Mahabadi et al., NeurIPS 2021, section 4: the low-rank baseline)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlpet_lightning.checks import positive
from vlpet_lightning.pet.adapter import Adapter, Flow
from vlpet_lightning.pet.compacter import GAIN


class LowRankLinear(nn.Module):
    """Low-rank linear layer ``x (left right) + b`` (src/adapters/low_rank_layer.py).

    The original multiplies the two factors elementwise, which equals the matrix product for rank 1 only. This layer
    computes the matrix product for every rank.

    Args:
        inputs: Input width.
        outputs: Output width.
        rank: Rank of the weight matrix.
    """

    def __init__(self, inputs: int, outputs: int, *, rank: int) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(inputs, positive("factor_rank", rank)))
        self.right = nn.Parameter(torch.empty(rank, outputs))
        for factor in (self.left, self.right):
            nn.init.xavier_uniform_(factor, gain=GAIN)
        self.b = nn.Parameter(torch.zeros(outputs))

    @torch.no_grad()
    def silence(self) -> None:
        """Zero the output by zeroing one factor only; with both at zero, neither would receive a gradient."""
        self.right.zero_()
        self.b.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.left) @ self.right + self.b

    def extra_repr(self) -> str:
        return f"{self.left.shape[0]}, {self.right.shape[1]}, rank={self.right.shape[0]}"


class LowRankAdapter(Adapter):
    """Adapter whose projections are low-rank, each a product of two thin matrices.

    Args:
        width: Number of channels ``d``.
        rank: Bottleneck width.
        factor_rank: Rank of each projection (``--low_rank_rank``).
        flow: As in :class:`Adapter`.
        scale: Factor on the adapter's output.
    """

    ranks = ("rank", "factor_rank")

    def __init__(
        self, width: int, *, rank: int = 96, factor_rank: int = 1, flow: Flow = "sequential", scale: float = 1.0
    ) -> None:
        self.factor_rank = factor_rank
        super().__init__(width, rank=rank, flow=flow, scale=scale)

    def projections(self, width: int, rank: int) -> tuple[nn.Module, nn.Module]:
        return LowRankLinear(width, rank, rank=self.factor_rank), LowRankLinear(rank, width, rank=self.factor_rank)

    def silence(self) -> None:
        self.up.silence()  # type: ignore[operator]
