"""Bottleneck adapters: VL-Adapter (Sung et al., CVPR 2022) and the parallel adapter (He et al., ICLR 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlpet_lightning.checks import choice, positive
from vlpet_lightning.pet.unit import Init, Unit, last_linear, linear, scaled, starts_at_zero, zero

Split = Literal["down", "up", "both", "pairs"]
Flow = Literal["sequential", "parallel", "replace"]


class PairedUp(nn.Module):
    """Block-diagonal up projection for paired heads: output block ``i`` is a linear map of hidden block ``i`` only.

    Args:
        rank: Total hidden width over all heads.
        width: Total output width over all heads.
        heads: Number of heads; must divide ``rank`` and ``width``.
        init: Initialisation of each head's linear layer.
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
    """Bottleneck adapter ``h + scale * up(gelu(down(h)))`` and its variants.

    Source: src/adapters/adapter_controller.py and adapter_modeling.py.

    Args:
        width: Number of channels ``d``.
        rank: Bottleneck width.
        heads: Number of heads in the projections selected by ``split``.
        split: Projections that are split into heads. Each head reads its projection's full input, so the heads of a
            projection are equivalent to one linear layer: ``down``, ``up`` and ``both`` only require that ``heads``
            divides the widths. ``pairs`` is a different function: head ``i`` of ``up`` reads only head ``i`` of
            ``down``.
        flow: ``sequential`` reads ``h`` and adds to ``h``; ``parallel`` reads ``x`` and adds to ``h``; ``replace``
            reads ``x`` and adds to ``x``, ignoring the frozen projection's output.
        scale: Factor on the adapter's output.
        pretrained_scale: Factor on the tensor to which the adapter's output is added.
        norms: ``before`` adds a layer norm before the bottleneck, ``after`` adds one after it (before the sum).
        init: Initialisation of new weights.
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
        self.rank = positive("rank", rank)
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
        """Create ``(down, up)``; override this for other kinds of projections."""
        down = linear(width, rank, self.init)
        if self.split == "pairs":
            return down, PairedUp(rank, width, heads=self.heads, init=self.init)
        return down, last_linear(rank, width, self.init)

    def map_to(self, width: int) -> None:
        """Map ``x`` to the width of ``h`` (parallel), or act on ``h`` alone (sequential)."""
        if self.flow == "sequential" and self.norm_before is None and self.norm_after is None:
            check_heads(width, self.rank, self.heads, self.split)
            self.down, self.up = self.projections(width, self.rank)
        elif self.flow == "parallel" and self.heads == 1 and self.norm_after is None:
            self.up = self.projections(width, self.rank)[1]
        else:
            super().map_to(width)

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
            nn.init.zeros_(self.norm_after.bias)  # a layer norm maps an all-zero input to its bias

    def silence(self) -> None:
        """Zero the output of the up projection while keeping it trainable."""
        zero(self.up)

    def extra_repr(self) -> str:
        said = [f"split={self.split}, heads={self.heads}"] * (self.heads > 1)
        said += [f"flow={self.flow}"] * (self.flow != "sequential") + [f"scale={self.scale}"]
        said += [f"pretrained_scale={self.pretrained_scale}"] * (self.pretrained_scale != 1.0)
        return ", ".join(said)


def check_heads(width: int, rank: int, heads: int, split: Split) -> None:
    """Check that ``heads`` divides every width that is split into heads.

    Raises:
        ValueError: If a width is not divisible by ``heads``, or ``split`` is unknown.
    """
    choice("split", split, ("down", "up", "both", "pairs"))
    positive("heads", heads)
    if split != "up" and rank % heads:
        raise ValueError(f"rank {rank} is not divisible by heads {heads}: each head gets rank / heads rows")
    if split != "down" and width % heads:
        raise ValueError(f"width {width} is not divisible by heads {heads}: each head gives width / heads channels")
