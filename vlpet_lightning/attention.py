"""Choice of attention kernels on a GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

CUDNN_FROM = 128  # positions; only 56 were measured
OTHERS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention_kernels(length: int, device: torch.device) -> AbstractContextManager[Any]:
    """Exclude cuDNN's kernels, torch's first choice on recent GPUs, for short inputs.

    With a padding mask and dropout, 56 positions of BART-base take 1.4 ms on an H200 with cuDNN's kernels and 1.0 ms
    with the memory-efficient ones (docs/performance.md).

    Args:
        length: Number of encoder positions.
        device: Device of the attention; nothing is changed unless it is a GPU.
    """
    return sdpa_kernel(OTHERS) if device.type == "cuda" and length < CUDNN_FROM else nullcontext()
