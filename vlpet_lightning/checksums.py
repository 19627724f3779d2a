"""Checksums of files, and of weights in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return a digest of a few values of each matrix, to recognise a model quickly.

    It covers names, shapes without the number of rows, which grows with a vocabulary, and the first eight values. They
    are rounded to bfloat16, so that the type in which frozen weights are stored does not change the digest.

    Args:
        weights: Parameters by name; vectors are left out.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        if weight.dim() > 1:
            digest.update(f"{name} {tuple(weight.shape[1:])}".encode())
            digest.update(weight.detach()[0].flatten()[:8].bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()
