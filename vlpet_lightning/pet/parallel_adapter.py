"""The parallel adapter that VL-PET puts on the decoder's cross-attention value (paper section 3.4)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vlpet_lightning.pet.unit import Unit, linear, positive, zero


class ParallelAdapter(Unit):
    """``h + up(gelu(down(x)))``: beside the frozen projection rather than behind it.

    At ``decoder.cross.value`` ``x`` is the encoder's output and ``h`` the values before the split into heads; keys stay
    as they are (my_transformers/modeling_bart.py, BartAttention: ``attn_value_parallel_adapter``).

    Args:
        width: ``d``.
        rank: Bottleneck of the adapter.
        scale: Factor on the adapter's part.
    """

    def __init__(self, width: int, *, rank: int = 96, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.down = linear(width, positive("rank", rank))
        self.up = linear(rank, width)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        delta = self.up(F.gelu(self.down(x), approximate="tanh"))
        return h + (delta if self.scale == 1.0 else self.scale * delta)

    def start_as_identity(self) -> None:
        zero(self.up)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"
