"""Parallel adapter, used by VL-PET at the decoder's cross-attention value (paper section 3.4)."""

from __future__ import annotations

from vlpet_lightning.pet.adapter import Adapter
from vlpet_lightning.pet.unit import Init


class ParallelAdapter(Adapter):
    """Adapter ``h + up(gelu(down(x)))``, in parallel with the frozen projection rather than after it.

    At ``decoder.cross.value``, ``x`` is the encoder's output and ``h`` the values before the split into heads; the keys
    are unchanged (my_transformers/modeling_bart.py, BartAttentionWithValueAdapter: ``attn_value_parallel_adapter``).

    Args:
        width: Number of channels ``d``.
        rank: Bottleneck width of the adapter.
        scale: Factor on the adapter's output.
        init: Initialisation of new weights.
    """

    def __init__(self, width: int, *, rank: int = 96, scale: float = 1.0, init: Init = "normal") -> None:
        super().__init__(width, rank=rank, flow="parallel", scale=scale, init=init)
