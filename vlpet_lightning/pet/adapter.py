"""Bottleneck adapters: VL-Adapter (Sung et al., CVPR 2022) and the parallel adapter (He et al., ICLR 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlpet_lightning.checks import choice, positive
from vlpet_lightning.pet.unit import Init, Unit, last_linear, linear, starts_at_zero, zero

Split = Literal["down", "up", "both", "pairs"]
Flow = Literal["sequential", "parallel", "replace"]


class PairedUp(nn.Module):
    """The up projection of head pairs: output part ``i`` is a linear map of hidden part ``i`` only.

    Args:
        rank: Hidden width of all heads together.
        width: Output width of all heads together.
        heads: Must divide both.
        init: Of each head's linear layer.
    """

    def __init__(self, rank: int, width: int, *, heads: int, init: Init = "normal") -> None:
        super().__init__()
        parts = [last_linear(rank // heads, width // heads, init) for _ in range(heads)]
        self.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]))  # (width, rank / heads)
        self.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]))
        self.heads = heads

    def forward(self, hidden: Tensor) -> Tensor:
        parts = hidden.unflatten(-1, (self.heads, -1))  # (..., heads, rank / heads)
        weight = self.weight.unflatten(0, (self.heads, -1))  # (heads, width / heads, rank / heads)
        return torch.einsum("...hr,hdr->...hd", parts, weight).flatten(-2) + self.bias

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


class Adapter(Unit):
    """``h + scale * up(gelu(down(h)))`` and its variants (src/adapters/adapter_controller.py, adapter_modeling.py).

    Args:
        width: ``d``.
        rank: Bottleneck.
        heads: Number of heads of the projections that ``split`` names.
        split: Which projections have heads. A head reads all of its input, so that the heads of a projection together
            are one linear layer: ``down``, ``up`` and ``both`` only ask that ``heads`` divides the widths. ``pairs``
            is another function: head ``i`` of ``up`` reads head ``i`` of ``down`` alone.
        flow: ``sequential`` reads and adds to ``h``; ``parallel`` reads ``x`` and adds to ``h``; ``replace`` reads and
            adds to ``x``, and the frozen projection's output is not used.
        scale: Factor on the adapter's part.
        pretrained_scale: Factor on the tensor that the adapter's part is added to.
        norms: ``before`` adds a layer norm before the bottleneck, ``after`` one after it (before the sum).
        init: How fresh weights are drawn.
    """

    def __init__(
        self,
        width: int,
        *,
        rank: int = 96,
        heads: int = 1,
        split: Split = "down",
        flow: Flow = "sequential",
        scale: float = 1.0,
        pretrained_scale: float = 1.0,
        norms: Sequence[Literal["before", "after"]] = (),
        init: Init = "normal",
    ) -> None:
        super().__init__()
        positive("rank", rank)
        check_heads(width, rank, heads, split)
        self.heads = heads
        self.split = split
        self.flow = choice("flow", flow, ("sequential", "parallel", "replace"))
        self.scale = scale
        self.pretrained_scale = pretrained_scale
        self.init: Init = init
        self.down, self.up = self.projections(width, rank)
        for name in norms:
            choice("norms", name, ("before", "after"))
        self.norm_before = nn.LayerNorm(width) if "before" in norms else None
        self.norm_after = nn.LayerNorm(width) if "after" in norms else None

    def projections(self, width: int, rank: int) -> tuple[nn.Module, nn.Module]:
        """Build ``(down, up)``; methods with other projections override this."""
        down = linear(width, rank, self.init)
        if self.split == "pairs":
            return down, PairedUp(rank, width, heads=self.heads, init=self.init)
        return down, last_linear(rank, width, self.init)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        delta = h if self.flow == "sequential" else x
        if self.norm_before is not None:
            delta = self.norm_before(delta)
        delta = scaled(self.up(F.gelu(self.down(delta), approximate="tanh")), self.scale)
        if self.norm_after is not None:
            delta = self.norm_after(delta)
        return scaled(x if self.flow == "replace" else h, self.pretrained_scale) + delta

    @property
    def is_identity(self) -> bool:
        return starts_at_zero(self.init) and self.flow != "replace" and self.pretrained_scale == 1.0

    def start_as_identity(self) -> None:
        if self.flow == "replace":
            raise ValueError("an adapter with `flow: replace` has no identity start: use `start: original`")
        self.pretrained_scale = 1.0
        self.silence()
        if self.norm_after is not None:
            nn.init.zeros_(self.norm_after.bias)  # the norm's output on zeros is its bias

    def silence(self) -> None:
        """Zero the output of the up projection while keeping it trainable."""
        zero(self.up)

    def extra_repr(self) -> str:
        said = [f"split={self.split}, heads={self.heads}"] * (self.heads > 1)
        said += [f"flow={self.flow}"] * (self.flow != "sequential") + [f"scale={self.scale}"]
        said += [f"pretrained_scale={self.pretrained_scale}"] * (self.pretrained_scale != 1.0)
        return ", ".join(said)


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """Return ``factor * tensor``, without the multiplication if the factor is 1."""
    return tensor if factor == 1.0 else factor * tensor


def check_heads(width: int, rank: int, heads: int, split: Split) -> None:
    """Check that the number of heads divides the widths.

    Raises:
        ValueError: If it does not, or ``split`` is unknown.
    """
    choice("split", split, ("down", "up", "both", "pairs"))
    positive("heads", heads)
    if split != "up" and rank % heads:
        raise ValueError(f"rank {rank} is not divisible by heads {heads}: each head gets rank / heads rows")
    if split != "down" and width % heads:
        raise ValueError(f"width {width} is not divisible by heads {heads}: each head gives width / heads channels")
