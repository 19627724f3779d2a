"""VL-PET's design space in five settings, for sweeps (paper section 3: granularity, heads, modules)."""

from __future__ import annotations

from functools import partial
from typing import Literal

from vlpet_lightning.pet.gates import Gate, LargeGate, MiddleXGate, MiddleYGate, SmallGate
from vlpet_lightning.pet.parallel_adapter import ParallelAdapter
from vlpet_lightning.pet.placement import Placement
from vlpet_lightning.pet.vlpet import VLPET

GATES: dict[str, type[Gate]] = {
    "large": LargeGate,
    "middle_x": MiddleXGate,
    "middle_y": MiddleYGate,
    "small": SmallGate,
}


class Granularity:
    """Shorthand for placements: ``placements: {class_path: vlpet_lightning.pet.Granularity, init_args: ...}``.

    Its defaults are VL-PET-large's on BART-base. What it cannot say, a list of placements can.

    Args:
        gate: The gate's granularity.
        rank: Width of the adapters' bottleneck, and of the large gate's.
        heads: Heads of the adapters' down-projection.
        at: Sites of the gated adapters.
        value_rank: Width of the parallel adapter at the decoder's cross-attention values; 0 for none.

    Raises:
        ValueError: If there is no such gate, or a number makes no sense.
    """

    def __init__(
        self,
        gate: Literal["large", "middle_x", "middle_y", "small"] = "large",
        rank: int = 96,
        heads: int = 4,
        at: Literal["encoder", "encoder.attn", "encoder.ffn"] = "encoder",
        value_rank: int = 96,
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

    def placements(self) -> list[Placement]:
        """Return the list of placements."""
        kind = GATES[self.gate]
        gate = partial(kind, rank=self.rank) if kind is LargeGate else kind
        sites: list[str] = ["encoder.attn", "encoder.ffn"] if self.at == "encoder" else [self.at]
        placed = [Placement(sites, partial(VLPET, rank=self.rank, heads=self.heads, gate=gate))]
        if self.value_rank:
            placed.append(Placement(["decoder.cross.value"], partial(ParallelAdapter, rank=self.value_rank)))
        return placed
