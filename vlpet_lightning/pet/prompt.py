"""Prompt tuning: learned tokens prepended to a stack's input (Li and Liang, ACL 2021; src/prompt/ of VL-Adapter)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlpet_lightning.checks import positive
from vlpet_lightning.pet.unit import Init, Unit, linear


class Prompt(Unit):
    """Prompt ``W_2 tanh(W_1 E + b_1) + b_2`` prepended to the embedded text; also reparametrised at inference.

    Place it at ``encoder.prompt`` (tokens before the text, not counted as positions) or at ``decoder.prompt`` (keys and
    values from a decoder pass over the tokens, prepended to those of the answer). At ``decoder.prompt`` of a
    decoder-only model, the tokens stand in front of the whole sequence and are counted as positions.

    Args:
        width: Number of channels ``d``.
        length: Number of tokens ``P``.
        hidden: Hidden width of the reparametrisation (``--mid_dim``).
        init: Initialisation of the linear layers; the token embedding is drawn from N(0, 0.02) with ``normal``,
            otherwise from N(0, 1).
    """

    adds_tokens = True
    ranks = ("length", "hidden")
    unmergeable = "its tokens are part of the input"

    def __init__(self, width: int, *, length: int = 40, hidden: int = 800, init: Init = "normal") -> None:
        super().__init__()
        self.length = positive("length", length)
        self.embedding = nn.Embedding(length, width)
        if init.startswith("normal"):
            nn.init.normal_(self.embedding.weight, std=0.02)
        self.down = linear(width, positive("hidden", hidden), init)
        self.up = linear(hidden, width, init)

    def tokens(self) -> Tensor:
        """Compute the ``(P, d)`` prompt tokens."""
        return self.up(torch.tanh(self.down(self.embedding.weight)))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Prepend the tokens to ``h`` ``(B, T, d)``; returns ``(B, P + T, d)``."""
        return torch.cat([self.tokens().to(h.dtype).expand(len(h), -1, -1), h], dim=1)

    def start_as_identity(self) -> None:
        """Raise ValueError: no initialisation of added tokens preserves the pretrained function."""
        raise ValueError("Prompt has no identity start (its tokens are always attended to): use `start: original`")
