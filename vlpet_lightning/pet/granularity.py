"""VL-PET's design space as a few settings for sweeps (paper section 3: granularity, heads, modules)."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from vlpet_lightning.pet.gates import Gate, LargeGate, MiddleXGate, MiddleYGate, SmallGate
from vlpet_lightning.pet.parallel_adapter import ParallelAdapter
from vlpet_lightning.pet.placement import Placement
from vlpet_lightning.pet.unit import Positions
from vlpet_lightning.pet.vlpet import VLPET

GATES: dict[str, type[Gate]] = {
    "large": LargeGate,
    "middle_x": MiddleXGate,
    "middle_y": MiddleYGate,
    "small": SmallGate,
}


class Granularity:
    """Shorthand for a list of placements.

    In a config: ``placements: {class_path: vlpet_lightning.pet.Granularity, init_args: ...}``. The defaults are those
    of VL-PET-large on BART-base. For any other design, use a list of placements.

    Args:
        gate: Granularity of the gate.
        rank: Bottleneck width of the adapters and of the large gate.
        heads: Number of heads in the adapters' down projection.
        at: Sites of the gated adapters: those of an encoder, or ``decoder...`` of a decoder-only model.
        value_rank: Bottleneck width of the parallel adapter at the decoder's cross-attention values, in a decoder-only
            model at the values of its attention; 0 disables it.
        positions: Positions at which the gated adapters act; None for ``prefix`` in a decoder-only model, and all
            otherwise.

    Raises:
        ValueError: If the gate is unknown, or a number is out of range.
    """

    def __init__(
        self,
        gate: Literal["large", "middle_x", "middle_y", "small"] = "large",
        rank: int = 96,
        heads: int = 4,
        at: Literal["encoder", "encoder.attn", "encoder.ffn", "decoder", "decoder.attn", "decoder.ffn"] = "encoder",
        value_rank: int = 96,
        positions: Positions | None = None,
    ) -> None:
        if gate not in GATES:
            raise ValueError(f"unknown gate {gate!r}: choose from {', '.join(GATES)}")
        if rank < 1 or heads < 1 or value_rank < 0:
            raise ValueError(
                f"rank and heads must be 1 or more, value_rank 0 or more: got {rank}, {heads}, {value_rank}"
            )
        self.gate = gate
        self.rank = rank
        self.heads = heads
        self.at = at
        self.value_rank = value_rank
        self.positions = positions

    def placements(self) -> list[Placement]:
        """Build the equivalent list of placements."""
        kind = GATES[self.gate]
        gate = partial(kind, rank=self.rank) if kind is LargeGate else kind
        stack, _, sublayer = self.at.partition(".")
        sites: list[str] = [self.at] if sublayer else [f"{stack}.attn", f"{stack}.ffn"]
        usual, values = ("all", "decoder.cross.value") if stack == "encoder" else ("prefix", "decoder.attn.value")
        positions: Any = self.positions or usual
        placed = [Placement(sites, partial(VLPET, rank=self.rank, heads=self.heads, gate=gate), positions)]
        if self.value_rank:
            placed.append(Placement([values], partial(ParallelAdapter, rank=self.value_rank)))
        return placed
