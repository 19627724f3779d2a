"""VL-PET's granularity-controlled gates (paper section 3.2; released code: my_transformers/modeling_bart.py).

A gate maps the sublayer's input ``x`` and the adapted output ``h`` (both ``(B, S, d)``) to factors that broadcast over
``h``. From fine to coarse: large ``(B, S, d)``, middleX ``(B, S, 1)``, middleY ``(d,)``, small ``(B, 1, 1)``.

In the released code every sigmoid gate starts near 0.5, which halves each gated branch at initialisation.
``start_as_identity`` applies the corrected initialisation instead: all factors are exactly 1, obtained from a zero
argument to the sigmoid and the scale ``s = 2`` in front of it (the ``s`` of the paper's figure 3).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlpet_lightning.checks import choice, positive
from vlpet_lightning.pet.unit import INIT_STD, Configurable, Context, Init, last_linear, linear, scaled, zero

Combine = Literal["multiply", "add"]


class Gate(Configurable, nn.Module):
    """Base class of gates ``(x, h) -> G``; see the module's docstring.

    Attributes:
        scale: Factor on the sigmoid's output: the paper's ``s``; 1 in the released code.
        reads_other_positions: Whether the factors of a position depend on other positions.
    """

    needs_context = False
    reads_other_positions = False
    context: Context | None = None
    scale: float = 1.0

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define forward(x, h)")

    def modulate(self, x: Tensor, h: Tensor, adapted: Tensor, combine: Combine) -> Tensor:
        """Apply the gate to a tensor.

        Args:
            x: ``(B, S, d)``, input of the sublayer.
            h: ``(B, S, d)``, second input of the gate.
            adapted: ``(B, S, d)``, tensor to be gated.
            combine: ``multiply``, or the ablation ``add`` (``--use_encoder_adapter_gating_add``).
        """
        factors = self(x, h)
        return adapted * factors if combine == "multiply" else adapted + factors

    def start_as_identity(self) -> None:
        """Re-initialise the gate so that every factor is exactly 1."""
        raise NotImplementedError(f"{type(self).__name__} must define start_as_identity()")

    def extra_repr(self) -> str:
        """Report the scale: trained weights are only valid with the scale they were trained with."""
        return f"scale={self.scale}"


class LargeGate(Gate):
    """Low-rank gate per token and channel, from ``x`` only: ``G = s sigmoid(W_u gelu(W_d x + b_d) + b_u)``.

    Args:
        width: Number of channels ``d``.
        rank: Bottleneck width of the gate.
        scale: Factor ``s``.
        init: Initialisation of new weights.
    """

    def __init__(self, width: int, *, rank: int = 96, scale: float = 1.0, init: Init = "normal") -> None:
        super().__init__()
        self.scale = scale
        self.down = linear(width, positive("rank", rank), init)
        self.up = last_linear(rank, width, init)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return scaled(torch.sigmoid(self.up(F.gelu(self.down(x), approximate="tanh"))), self.scale)

    def start_as_identity(self) -> None:
        zero(self.up)
        self.scale = 2.0


class FullGate(Gate):
    """Full-rank gate per token and channel: ``G = s sigmoid(W x + b)`` (``--use_encoder_adapter_gating_large_x``).

    Args:
        width: Number of channels ``d``.
        scale: Factor ``s``.
        init: Initialisation of new weights.
    """

    def __init__(self, width: int, *, scale: float = 1.0, init: Init = "normal") -> None:
        super().__init__()
        self.scale = scale
        self.full = last_linear(width, width, init)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return scaled(torch.sigmoid(self.full(x)), self.scale)

    def start_as_identity(self) -> None:
        zero(self.full)
        self.scale = 2.0


class MiddleXGate(Gate):
    """Gate with one factor per token: ``G = s sigmoid(w (x + h) + b)``.

    Args:
        width: Number of channels ``d``.
        scale: Factor ``s``.
        init: Initialisation of new weights.
    """

    def __init__(self, width: int, *, scale: float = 1.0, init: Init = "normal") -> None:
        super().__init__()
        self.scale = scale
        self.score = last_linear(width, 1, init)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return scaled(torch.sigmoid(self.score(x + h)), self.scale)

    def start_as_identity(self) -> None:
        zero(self.score)
        self.scale = 2.0


class MiddleYGate(Gate):
    """Gate with one factor per channel, independent of the input.

    Args:
        width: Number of channels ``d``.
        scale: Factor ``s`` of the paper's form.
        form: ``code`` is ``1 + v``, as in the released checkpoints; ``paper`` is ``s (sigmoid(v) + 1)``, as in
            figure 3.
        init: ``normal`` draws ``v`` from N(0, 0.02); ``zero`` and ``one`` set it to that constant.
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
    """Gate with one factor per sample: ``G = mean_t s sigmoid(w [x_t; h_t] + b)``.

    The released code averages over all positions, padding included, so a sample's output depends on the batch it is
    in. If the model's context provides a mask, the average is taken over real positions only.

    Args:
        width: Number of channels ``d``.
        scale: Factor ``s``.
        init: Initialisation of new weights.
    """

    needs_context = True
    reads_other_positions = True

    def __init__(self, width: int, *, scale: float = 1.0, init: Init = "normal") -> None:
        super().__init__()
        self.scale = scale
        self.score = last_linear(2 * width, 1, init)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        gates = scaled(torch.sigmoid(self.score(torch.cat([x, h], dim=-1))), self.scale)  # (B, S, 1)
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
    """Ablation that replaces the gate by a layer norm (``--use_encoder_adapter_gating_layernorm``).

    Args:
        width: Number of channels ``d``.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def modulate(self, x: Tensor, h: Tensor, adapted: Tensor, combine: Combine) -> Tensor:
        return self.norm(adapted)


class L2NormGate(_NormGate):
    """Parameter-free ablation that replaces the gate by L2 normalisation (``--use_encoder_adapter_gating_l2norm``).

    Args:
        width: Number of channels ``d``; unused.
    """

    def __init__(self, width: int) -> None:
        super().__init__()

    def modulate(self, x: Tensor, h: Tensor, adapted: Tensor, combine: Combine) -> Tensor:
        return F.normalize(adapted, dim=-1)


def start_gate(gate: Gate | None, combine: Combine) -> None:
    """Re-initialise a unit's gate so that all factors are 1.

    Raises:
        ValueError: If the gate is added: the identity would then be 0, and gates cannot be initialised to 0.
    """
    if gate is None:
        return
    if combine == "add":
        raise ValueError("a gate that is added has no identity start: use `start: original`, or `combine: multiply`")
    gate.start_as_identity()
