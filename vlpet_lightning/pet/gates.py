"""VL-PET's granularity-controlled gates (paper section 3.2; released code: my_transformers/modeling_bart.py).

A gate maps the sublayer's input ``x`` and the adapted output ``h`` (both ``(B, S, d)``) to factors that broadcast over
``h``. From fine to coarse: large ``(B, S, d)``, middleX ``(B, S, 1)``, middleY ``(d,)``, small ``(B, 1, 1)``.

The released code starts every sigmoid gate near 0.5, so that each gated branch is halved at initialisation.
``start_as_identity`` gives the corrected start instead: factors of exactly 1, from a zero argument and the scale
``s = 2`` that the paper's figure 3 puts before the sigmoid.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlpet_lightning.checks import choice, positive
from vlpet_lightning.pet.unit import INIT_STD, Context, Init, last_linear, linear, zero

Combine = Literal["multiply", "add"]


class Gate(nn.Module):
    """A map ``(x, h) -> G``; see the module's docstring.

    Attributes:
        scale: Factor on the sigmoid: the paper's ``s``; 1 in the released code.
    """

    needs_context = False
    context: Context | None = None
    scale: float = 1.0

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define forward(x, h)")

    def modulate(self, x: Tensor, h: Tensor, adapted: Tensor, combine: Combine) -> Tensor:
        """Apply the gate.

        Args:
            x: ``(B, S, d)``, the sublayer's input.
            h: ``(B, S, d)``, the gate's second input.
            adapted: ``(B, S, d)``, the tensor to be gated.
            combine: ``multiply``, or the ablation ``add`` (``--use_encoder_adapter_gating_add``).
        """
        factors = self(x, h)
        return adapted * factors if combine == "multiply" else adapted + factors

    def start_as_identity(self) -> None:
        """Re-initialise so that the gate is exactly 1 everywhere."""
        raise NotImplementedError(f"{type(self).__name__} must define start_as_identity()")

    def extra_repr(self) -> str:
        """Show the scale, since the same weights compute something else with another scale."""
        return f"scale={self.scale}"


class LargeGate(Gate):
    """One factor per token and channel, low rank: ``G = s sigmoid(W_u gelu(W_d x + b_d) + b_u)``, from ``x`` only.

    Args:
        width: ``d``.
        rank: Bottleneck of the gate.
        scale: ``s``.
        init: How fresh weights are drawn.
    """

    def __init__(self, width: int, *, rank: int = 96, scale: float = 1.0, init: Init = "normal") -> None:
        super().__init__()
        self.scale = scale
        self.down = linear(width, positive("rank", rank), init)
        self.up = last_linear(rank, width, init)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.scale * torch.sigmoid(self.up(F.gelu(self.down(x), approximate="tanh")))

    def start_as_identity(self) -> None:
        zero(self.up)
        self.scale = 2.0


class FullGate(Gate):
    """Full-rank gate with one factor per token and channel, ``G = s sigmoid(W x + b)``
    (``--use_encoder_adapter_gating_large_x``).

    Args:
        width: ``d``.
        scale: ``s``.
        init: How fresh weights are drawn.
    """

    def __init__(self, width: int, *, scale: float = 1.0, init: Init = "normal") -> None:
        super().__init__()
        self.scale = scale
        self.full = last_linear(width, width, init)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.scale * torch.sigmoid(self.full(x))

    def start_as_identity(self) -> None:
        zero(self.full)
        self.scale = 2.0


class MiddleXGate(Gate):
    """One factor per token, ``G = s sigmoid(w (x + h) + b)``.

    Args:
        width: ``d``.
        scale: ``s``.
        init: How fresh weights are drawn.
    """

    def __init__(self, width: int, *, scale: float = 1.0, init: Init = "normal") -> None:
        super().__init__()
        self.scale = scale
        self.score = last_linear(width, 1, init)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.scale * torch.sigmoid(self.score(x + h))

    def start_as_identity(self) -> None:
        zero(self.score)
        self.scale = 2.0


class MiddleYGate(Gate):
    """One factor per channel, independent of the input.

    Args:
        width: ``d``.
        scale: ``s`` of the paper's form.
        form: ``code`` is ``1 + v``, as in the released checkpoints; ``paper`` is figure 3's
            ``s (sigmoid(v) + 1)``.
        init: ``normal`` draws ``v`` from N(0, 0.02); ``zero`` and ``one`` fill it.
    """

    def __init__(
        self,
        width: int,
        *,
        scale: float = 1.0,
        form: Literal["code", "paper"] = "code",
        init: Literal["normal", "zero", "one"] = "normal",
    ) -> None:
        super().__init__()
        self.scale = scale
        self.form = choice("form", form, ("code", "paper"))
        if form == "code" and scale != 1.0:
            raise ValueError(f"scale {scale} belongs to `form: paper`: the released code's middleY gate is 1 + v")
        choice("init", init, ("normal", "zero", "one"))
        self.vector = nn.Parameter(torch.empty(width).normal_(std=INIT_STD))
        if init != "normal":
            nn.init.constant_(self.vector, float(init == "one"))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        if self.form == "paper":
            return self.scale * (torch.sigmoid(self.vector) + 1)
        return 1 + self.vector

    def start_as_identity(self) -> None:
        with torch.no_grad():
            self.vector.zero_()
        if self.form == "paper":
            self.scale = 2 / 3  # s (sigmoid(0) + 1) = 1.5 s

    def extra_repr(self) -> str:
        return f"scale={self.scale}" + f", form={self.form}" * (self.form != "code")


class SmallGate(Gate):
    """One factor per sample, ``G = mean_t s sigmoid(w [x_t; h_t] + b)``.

    The released code averages over all positions of the batch, padding included, so that a sample's output depends on
    its batch. If the context has a mask, the mean is over real positions only.

    Args:
        width: ``d``.
        scale: ``s``.
        init: How fresh weights are drawn.
    """

    needs_context = True

    def __init__(self, width: int, *, scale: float = 1.0, init: Init = "normal") -> None:
        super().__init__()
        self.scale = scale
        self.score = last_linear(2 * width, 1, init)

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


class _NormGate(Gate):
    def start_as_identity(self) -> None:
        raise ValueError(f"{type(self).__name__} has no identity start: use `start: original`")

    def extra_repr(self) -> str:
        return ""


class LayerNormGate(_NormGate):
    """A layer norm instead of the gate: an ablation (``--use_encoder_adapter_gating_layernorm``).

    Args:
        width: ``d``.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def modulate(self, x: Tensor, h: Tensor, adapted: Tensor, combine: Combine) -> Tensor:
        return self.norm(adapted)


class L2NormGate(_NormGate):
    """L2 normalisation instead of the gate: an ablation without parameters (``--use_encoder_adapter_gating_l2norm``).

    Args:
        width: ``d``; not needed.
    """

    def __init__(self, width: int) -> None:
        super().__init__()

    def modulate(self, x: Tensor, h: Tensor, adapted: Tensor, combine: Combine) -> Tensor:
        return F.normalize(adapted, dim=-1)


def start_gate(gate: Gate | None, combine: Combine) -> None:
    """Initialise a unit's gate to exactly 1.

    Raises:
        ValueError: If the gate is added: the identity would then be 0, and gates cannot start at 0.
    """
    if gate is None:
        return
    if combine == "add":
        raise ValueError("a gate that is added has no identity start: use `start: original`, or `combine: multiply`")
    gate.start_as_identity()
