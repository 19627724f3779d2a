"""(IA)^3 (Liu et al., NeurIPS 2022): learned vectors that rescale keys, values and inner activations."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vlpet_lightning.checks import choice
from vlpet_lightning.pet.unit import INIT_STD, Unit


class IA3(Unit):
    """Rescaling ``h * l`` with one learned factor per channel.

    The paper uses the sites ``*.attn.key``, ``*.attn.value`` and ``*.ffn.inner``; the original code uses the decoder's
    cross-attention value and inner activations (my_transformers/modeling_bart.py: ``use_decoder_*_ia3``).

    Args:
        width: Number of channels.
        form: ``scale`` is ``h * l``; ``delta`` is ``h + h * l`` (the original's ``_add`` flags).
        init: Initial value of ``l``. ``identity`` is 1 (``scale``) or 0 (``delta``), as in the paper; ``normal`` draws
            from N(0, 0.02), as in the original without its ``_one_init`` flags; ``one`` is 1 in either form, as in the
            original with those flags.
    """

    def __init__(
        self,
        width: int,
        *,
        form: Literal["scale", "delta"] = "scale",
        init: Literal["identity", "normal", "one"] = "identity",
    ) -> None:
        super().__init__()
        self.form = choice("form", form, ("scale", "delta"))
        self.init = choice("init", init, ("identity", "normal", "one"))
        self.vector = nn.Parameter(torch.empty(width).normal_(std=INIT_STD))
        if init == "one":
            nn.init.ones_(self.vector)
        elif init == "identity":
            self.start_as_identity()

    def map_to(self, width: int) -> None:
        self.__init__(width, form=self.form, init=self.init)  # type: ignore[misc]

    def factors(self) -> Tensor:
        """Return the ``(d,)`` factors by which channels are multiplied."""
        return self.vector if self.form == "scale" else 1 + self.vector

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return h * self.factors()

    @property
    def is_identity(self) -> bool:
        return self.init == "identity" or (self.init == "one" and self.form == "scale")

    @torch.no_grad()
    def start_as_identity(self) -> None:
        self.vector.fill_(1.0 if self.form == "scale" else 0.0)

    @torch.no_grad()
    def merge(self, linear: nn.Linear, *, side: Literal["input", "output"] = "output") -> None:
        if side == "input":
            linear.weight.mul_(self.factors())
            return
        linear.weight.mul_(self.factors().unsqueeze(-1))
        if linear.bias is not None:
            linear.bias.mul_(self.factors())

    def extra_repr(self) -> str:
        return f"{self.vector.shape[0]}, form={self.form}"
