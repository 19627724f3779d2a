"""VL-PET's encoder module: a light multi-head adapter under a granularity-controlled gate (paper sections 3.2, 3.3)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from vlpet_lightning.pet.gates import Gate
from vlpet_lightning.pet.unit import Unit, linear, positive, zero


class VLPET(Unit):
    """``G(x, h') * h'`` with ``h' = h + up(gelu(down(h)))``.

    The gate multiplies the whole branch, pretrained output included, as in the released code
    (my_transformers/modeling_bart.py, encoder layer), not the adapter's part alone.

    Args:
        width: ``d``.
        rank: Bottleneck of the adapter.
        heads: Heads of the down projection. Every head reads all of ``h``, so that the heads together are one linear
            layer of ``rank`` outputs: the number has no effect beyond having to divide ``rank``.
        gate: Makes the gate from ``d``; None leaves the adapter ungated.
        scale: Factor on the whole branch (the T5 recipe's 0.3).
    """

    def __init__(
        self,
        width: int,
        *,
        rank: int = 96,
        heads: int = 4,
        gate: Callable[[int], Gate] | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if positive("rank", rank) % positive("heads", heads):
            raise ValueError(f"rank {rank} is not divisible by heads {heads}: each head gets rank / heads rows")
        self.heads = heads
        self.scale = scale
        self.down = linear(width, rank)
        self.up = linear(rank, width)
        self.gate = None if gate is None else gate(width)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        h = h + self.up(F.gelu(self.down(h), approximate="tanh"))
        if self.gate is not None:
            h = h * self.gate(x, h)
        return h if self.scale == 1.0 else self.scale * h

    def start_as_identity(self) -> None:
        zero(self.up)
        self.scale = 1.0
        if self.gate is not None:
            self.gate.start_as_identity()

    def gate_parameters(self) -> list[nn.Parameter]:
        return [] if self.gate is None else list(self.gate.parameters())

    def extra_repr(self) -> str:
        return f"heads={self.heads}, scale={self.scale}"
