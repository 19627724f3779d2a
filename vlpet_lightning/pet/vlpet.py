"""VL-PET's encoder module: light multi-head adapter with granularity-controlled gate (paper sections 3.2, 3.3)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vlpet_lightning.checks import choice
from vlpet_lightning.pet.adapter import Adapter, Split
from vlpet_lightning.pet.gates import Combine, Gate, start_gate
from vlpet_lightning.pet.unit import Init, Unit, scaled


class VLPET(Adapter):
    """Gated multi-head adapter ``G(x, h') * h'`` with ``h' = h + up(gelu(down(h)))``.

    As in the released code (my_transformers/modeling_bart.py, encoder layer), the gate multiplies the whole branch,
    including the pretrained output, not only the adapter's output.

    Args:
        width: Number of channels ``d``.
        rank: Bottleneck width of the adapter.
        heads: Number of heads in the projections; see ``split`` of :class:`Adapter` for their effect.
        split: Projections that are split into heads; ``down`` in the released scripts.
        gate: Factory of the gate, called with ``d``; None disables the gate.
        combine: Multiply by the gate (the method), or add it (an ablation).
        scale: Factor on the whole branch (0.3 in the T5 recipe).
        init: Initialisation of the adapter's new weights; the gate has its own setting.
    """

    def __init__(
        self,
        width: int,
        *,
        rank: int = 96,
        heads: int = 4,
        split: Split = "down",
        gate: Callable[[int], Gate] | None = None,
        combine: Combine = "multiply",
        scale: float = 1.0,
        init: Init = "normal",
    ) -> None:
        super().__init__(width, rank=rank, heads=heads, split=split, init=init)
        self.branch_scale = scale
        self.combine: Combine = choice("combine", combine, ("multiply", "add"))  # type: ignore[assignment]
        self.gate = None if gate is None else gate(width)

    def map_to(self, width: int) -> None:
        if self.gate is not None:  # it reads x and h
            Unit.map_to(self, width)
        super().map_to(width)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        h = super().forward(x, h)
        if self.gate is not None:
            h = self.gate.modulate(x, h, h, self.combine)
        return scaled(h, self.branch_scale)

    @property
    def is_identity(self) -> bool:
        return self.gate is None and self.branch_scale == 1.0 and super().is_identity

    def start_as_identity(self) -> None:
        super().start_as_identity()
        self.branch_scale = 1.0
        start_gate(self.gate, self.combine)

    def gate_parameters(self) -> list[nn.Parameter]:
        return [] if self.gate is None else list(self.gate.parameters())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, combine={self.combine}, branch_scale={self.branch_scale}"
