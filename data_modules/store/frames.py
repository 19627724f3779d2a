"""Padding and pooling of clips to a fixed number of frames.

Equivalent to ``resize`` in ``src/video/*_data.py`` of HenryHZY/VL-PET, which handles one clip.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_IMAGES = "clip_images"  # in the record of a store's extractor: number of images whose features a row holds


def lengths_of(features: Tensor) -> Tensor:
    """Count the frames before the trailing zero rows.

    Args:
        features: ``(B, F, D)``.

    Returns:
        ``(B,)`` int64.
    """
    numbers = torch.arange(1, features.shape[1] + 1, device=features.device)
    return ((features != 0).any(dim=2) * numbers).amax(dim=1)


def fit_frames(features: Tensor, lengths: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Pad clips that are too short with zero frames, and max-pool longer ones over time.

    Args:
        features: ``(B, F, D)``; rows past a clip's length are padding.
        lengths: ``(B,)`` frames of each clip.
        frames: ``V``, the target number of frames.

    Returns:
        ``(B, V, D)`` features and the ``(B, V)`` bool mask, true on frames and false on padding.
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
        # pooled in float32, which represents every float16 exactly: there is no CPU kernel for halves
        fitted[row] = F.adaptive_max_pool1d(clip.float(), frames)[0].T.to(features.dtype)
    return fitted, mask


def fit_clip(clip: np.ndarray, frames: int) -> np.ndarray:
    """Apply :func:`fit_frames` to one clip.

    Args:
        clip: ``(F, D)`` float16.
        frames: Target number of frames.

    Returns:
        ``(frames, D)`` float16.
    """
    fitted, _ = fit_frames(torch.from_numpy(clip)[None], torch.tensor([len(clip)]), frames)
    return fitted[0].numpy()
