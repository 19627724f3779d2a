"""Clips of any number of frames as a fixed number of tokens.

``resize`` in ``src/video/*_data.py`` of HenryHZY/VL-PET does the same to one clip.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def lengths_of(features: Tensor) -> Tensor:
    """The frames before the zero rows at the end.

    Args:
        features: ``(B, F, D)``.

    Returns:
        ``(B,)`` int64.
    """
    numbers = torch.arange(1, features.shape[1] + 1, device=features.device)
    return ((features != 0).any(dim=2) * numbers).amax(dim=1)


def fit_frames(features: Tensor, lengths: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Append zero frames to clips that are too short, and max-pool longer ones over time.

    Args:
        features: ``(B, F, D)``; what lies behind a clip's length is padding.
        lengths: ``(B,)`` frames of each clip.
        frames: ``V``, the frames that are wanted.

    Returns:
        ``(B, V, D)`` features and the ``(B, V)`` bool mask, true on frames and false on zeros that were appended.
    """
    lengths = lengths.clamp(max=features.shape[1])
    mask = torch.arange(frames, device=features.device) < lengths[:, None]
    if features.shape[1] == frames:
        return features, mask
    fitted = features.new_zeros(len(features), frames, features.shape[2])
    kept = min(frames, features.shape[1])
    fitted[:, :kept] = features[:, :kept]
    for row in torch.nonzero(lengths > frames)[:, 0].tolist():
        clip = features[row, : int(lengths[row])].T.unsqueeze(0)
        # pooled as float32, which holds every float16: the CPU has no kernel for halves
        fitted[row] = F.adaptive_max_pool1d(clip.float(), frames)[0].T.to(features.dtype)
    return fitted, mask


def fit_clip(clip: np.ndarray, frames: int) -> np.ndarray:
    """:func:`fit_frames` of one clip.

    Args:
        clip: ``(F, D)`` float16.
        frames: Frames that are wanted.

    Returns:
        ``(frames, D)`` float16.
    """
    fitted, _ = fit_frames(torch.from_numpy(clip)[None], torch.tensor([len(clip)]), frames)
    return fitted[0].numpy()
