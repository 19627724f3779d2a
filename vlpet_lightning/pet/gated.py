"""VL-PET's gates around another method's unit, or around the sublayer's output (paper table 9)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from vlpet_lightning.checks import choice
from vlpet_lightning.pet.gates import Combine, Gate, start_gate
from vlpet_lightning.pet.unit import Place, Unit, UnitFactory, scaled


class Gated(Unit):
    """Gated unit ``s G(x, h') * h'`` with ``h' = unit(x, h)``.

    Args:
        width: Number of channels ``d``.
        unit: Factory of the wrapped unit; None gates the sublayer's own output (used together with LoRA, which is
            placed at the projections).
        gate: Factory of the gate, called with ``d``; None applies the scale only.
        combine: Multiply by the gate, or add it.
        scale: Factor ``s`` on the whole branch.
        reads: Second input of the gate, besides ``x``: ``adapted``, the unit's output, as in the released code, or
            ``sublayer``, the unit's input.
        residual: ``x`` adds the sublayer's input to the result (``--use_decoder_enc_attn_value_residual_connection``).
    """

    def __init__(
        self,
        width: int,
        *,
        unit: UnitFactory | None = None,
        gate: Callable[[int], Gate] | None = None,
        combine: Combine = "multiply",
        scale: float = 1.0,
        reads: Literal["adapted", "sublayer"] = "adapted",
        residual: Literal["none", "x"] = "none",
    ) -> None:
        super().__init__()
        self.unit = None if unit is None else unit(width)
        self.gate = None if gate is None else gate(width)
        self.combine: Combine = choice("combine", combine, ("multiply", "add"))  # type: ignore[assignment]
        self.scale = scale
        self.reads = choice("reads", reads, ("adapted", "sublayer"))
        self.residual = choice("residual", residual, ("none", "x"))
        self.may_skip_parameters = self.unit is not None and self.unit.may_skip_parameters

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        adapted = h if self.unit is None else self.unit(x, h)
        if self.gate is not None:
            adapted = self.gate.modulate(x, h if self.reads == "sublayer" else adapted, adapted, self.combine)
        adapted = scaled(adapted, self.scale)
        return x + adapted if self.residual == "x" else adapted

    def join(self, place: Place, shared: nn.ModuleDict) -> None:
        if self.unit is not None:
            self.unit.join(place, shared)

    @property
    def is_identity(self) -> bool:
        inside = self.unit is None or self.unit.is_identity
        return inside and self.gate is None and self.scale == 1.0 and self.residual == "none"

    def start_as_identity(self) -> None:
        if self.residual == "x":
            raise ValueError("a unit with `residual: x` has no identity start: use `start: original`")
        if self.unit is not None:
            self.unit.start_as_identity()
        start_gate(self.gate, self.combine)
        self.scale = 1.0

    def gate_parameters(self) -> list[nn.Parameter]:
        inside = [] if self.unit is None else self.unit.gate_parameters()
        return inside + ([] if self.gate is None else list(self.gate.parameters()))

    def extra_repr(self) -> str:
        return f"combine={self.combine}, scale={self.scale}, reads={self.reads}, residual={self.residual}"
