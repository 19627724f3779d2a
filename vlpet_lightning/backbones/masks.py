"""Attention masks."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(length: int, before: int = 0, *, device: torch.device) -> Tensor:
    """Return a ``(1, length, before + length)`` bool mask: each position attends to itself and all earlier ones."""
    return torch.ones(1, length, before + length, dtype=torch.bool, device=device).tril(before)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a bool mask to one that is added to attention scores: 0 where it is true, else the dtype's minimum."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
