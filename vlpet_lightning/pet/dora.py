"""DoRA (Liu et al., ICML 2024): LoRA on the direction of a frozen weight, with a trained magnitude for each row."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlpet_lightning.checks import positive
from vlpet_lightning.pet.unit import Unit


class DoRA(Unit):
    """``W' x + b`` with ``W' = m (W + s B A) / ||W + s B A||``, norms taken over each row.

    NVlabs/DoRA, image_video_text_understanding/VL-T5/src/trainer_base.py: DoraLinear. ``W`` and ``b`` are those of the
    frozen linear layer at the site, e.g. ``encoder.attn.query``. No dropout acts on the update there.

    Args:
        width: ``d``.
        rank: ``r`` of ``A`` ``(r, d)`` and ``B`` ``(d, r)``.
        scale: ``s``.
        detach_norm: Treat the norm as a constant in the backward pass, as Hugging Face peft and the repository's
            ``--dora_simple`` do.

    Raises:
        ValueError: If ``rank`` is below 1.
    """

    needs_linear = True

    def __init__(self, width: int, *, rank: int = 128, scale: float = 1.0, detach_norm: bool = False) -> None:
        super().__init__()
        self.scale = scale
        self.detach_norm = detach_norm
        self.lora_A = nn.Linear(width, positive("rank", rank), bias=False)
        self.lora_B = nn.Linear(rank, width, bias=False)
        self.magnitude = nn.Parameter(torch.ones(width))
        self._linear: list[nn.Linear] = []  # in a list, since a submodule would move the backbone's keys
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def map_to(self, width: int) -> None:
        self.lora_B = nn.Linear(self.lora_B.in_features, width, bias=False)
        self.magnitude = nn.Parameter(torch.ones(width))
        nn.init.zeros_(self.lora_B.weight)

    @torch.no_grad()
    def bind(self, linear: nn.Linear) -> None:
        self._linear = [linear]
        self.magnitude.copy_(linear.weight.norm(dim=1))

    @property
    def linear(self) -> nn.Linear:
        """The frozen layer whose weight is adapted.

        Raises:
            RuntimeError: If the unit is not in a model.
        """
        if not self._linear:
            raise RuntimeError("DoRA has no linear layer yet: put it into a model with vlpet_lightning.pet.inject")
        return self._linear[0]

    def factors(self) -> Tensor:
        """``(d,)``, ``m / ||W + s B A||``."""
        norm = (self.linear.weight + self.scale * (self.lora_B.weight @ self.lora_A.weight)).norm(dim=1)
        return self.magnitude / (norm.detach() if self.detach_norm else norm)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        bias = self.linear.bias
        projected = h if bias is None else h - bias
        factors = self.factors()
        # written as a change of h, which is exactly zero at the start
        return h + (factors - 1) * projected + factors * self.scale * self.lora_B(self.lora_A(x))

    @property
    def is_identity(self) -> bool:
        return True

    @torch.no_grad()
    def start_as_identity(self) -> None:
        nn.init.zeros_(self.lora_B.weight)
        self.magnitude.copy_(self.linear.weight.norm(dim=1))

    @torch.no_grad()
    def merge(self, linear: nn.Linear, *, side: Literal["input", "output"] = "output") -> None:
        if side == "input":
            raise ValueError("DoRA cannot be merged at a site on the input of a layer: place it on the output")
        changed = linear.weight + self.scale * (self.lora_B.weight @ self.lora_A.weight)
        linear.weight.copy_(F.normalize(changed, dim=1, eps=0.0) * self.magnitude.unsqueeze(1))

    def extra_repr(self) -> str:
        return f"scale={self.scale}, detach_norm={self.detach_norm}"
