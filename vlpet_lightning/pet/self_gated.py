"""Gating without an adapter: the sigmoid's argument is also the update (``--use_encoder_gating_large_x_lowrank``)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlpet_lightning.checks import choice, positive
from vlpet_lightning.pet.unit import Init, Unit, last_linear, linear, scaled


class SelfGated(Unit):
    """Self-gated update ``delta + h * sigmoid(delta)`` with ``delta = W_u gelu(W_d x)``.

    Source: my_transformers/modeling_bart.py, encoder layer.

    Args:
        width: Number of channels ``d``.
        rank: Bottleneck width (``--gating_down_dim``).
        gates: ``h`` is as above; ``sum`` is ``(delta + h) * sigmoid(delta)`` (``..._add_x2_deltay``).
        scale: Factor on the whole branch.
        init: Initialisation of new weights.
    """

    def __init__(
        self,
        width: int,
        *,
        rank: int = 96,
        gates: Literal["h", "sum"] = "h",
        scale: float = 1.0,
        init: Init = "normal",
    ) -> None:
        super().__init__()
        self.gates = choice("gates", gates, ("h", "sum"))
        self.scale = scale
        self.down = linear(width, positive("rank", rank), init)
        self.up = last_linear(rank, width, init)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        delta = self.up(F.gelu(self.down(x), approximate="tanh"))
        gate = torch.sigmoid(delta)
        return scaled((delta + h) * gate if self.gates == "sum" else delta + h * gate, self.scale)

    def gate_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def extra_repr(self) -> str:
        return f"gates={self.gates}, scale={self.scale}"
