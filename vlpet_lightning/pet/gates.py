"""VL-PET's granularity-controlled gates (paper section 3.2; released code: my_transformers/modeling_bart.py).

A gate maps what enters a sublayer, ``x``, and the adapted output, ``h`` (both ``(B, S, d)``), to factors that broadcast
over ``h``. From fine to coarse: large ``(B, S, d)``, middleX ``(B, S, 1)``, middleY ``(d,)``, small ``(B, 1, 1)``.

The released code starts every sigmoid gate near 0.5, so that each gated branch begins halved. ``start_as_identity``
gives the corrected start instead: factors of exactly 1, by the scale ``s = 2`` that the paper's figure 3 puts before
the sigmoid and a zero argument.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlpet_lightning.pet.unit import INIT_STD, Context, linear, positive, zero


class Gate(nn.Module):
    """A map ``(x, h) -> G``; see the module's docstring.

    Attributes:
        scale: Factor before the sigmoid's value; 1 in the released code.
    """

    needs_context = False
    context: Context | None = None
    scale: float = 1.0

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define forward(x, h)")

    def start_as_identity(self) -> None:
        """Re-initialise so that the gate is exactly 1 everywhere."""
        raise NotImplementedError(f"{type(self).__name__} must define start_as_identity()")

    def extra_repr(self) -> str:
        """The scale: weights that were trained behind one mean something else behind another."""
        return f"scale={self.scale}"


class LargeGate(Gate):
    """One factor a token and channel, ``G = sigmoid(W_u gelu(W_d x + b_d) + b_u)``: from ``x`` alone, of low rank.

    Args:
        width: ``d``.
        rank: Bottleneck of the gate.
    """

    def __init__(self, width: int, *, rank: int = 96) -> None:
        super().__init__()
        self.down = linear(width, positive("rank", rank))
        self.up = linear(rank, width)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.scale * torch.sigmoid(self.up(F.gelu(self.down(x), approximate="tanh")))

    def start_as_identity(self) -> None:
        zero(self.up)
        self.scale = 2.0


class MiddleXGate(Gate):
    """One factor a token, ``G = sigmoid(w (x + h) + b)``.

    Args:
        width: ``d``.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = linear(width, 1)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.scale * torch.sigmoid(self.score(x + h))

    def start_as_identity(self) -> None:
        zero(self.score)
        self.scale = 2.0


class MiddleYGate(Gate):
    """One factor a channel, ``G = 1 + v``: independent of the input and, in the released code, without a sigmoid.

    Args:
        width: ``d``.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.empty(width).normal_(std=INIT_STD))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return 1 + self.vector

    def start_as_identity(self) -> None:
        with torch.no_grad():
            self.vector.zero_()


class SmallGate(Gate):
    """One factor a sample, ``G = mean_t sigmoid(w [x_t; h_t] + b)``.

    The released code averages over all positions of the batch, padding included, so that a sample's output depends on
    the batch it is in. Where the model hands a mask in its context, only real positions count.

    Args:
        width: ``d``.
    """

    needs_context = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = linear(2 * width, 1)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        gates = self.scale * torch.sigmoid(self.score(torch.cat([x, h], dim=-1)))  # (B, S, 1)
        mask = None if self.context is None else self.context.mask
        if mask is None:
            return gates.mean(dim=1, keepdim=True)
        real = mask.unsqueeze(-1).to(gates.dtype)
        return (gates * real).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)

    def start_as_identity(self) -> None:
        zero(self.score)
        self.scale = 2.0
