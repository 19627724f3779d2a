"""Length-bucketed batches: samples of similar length share a batch, so that less of it is padding."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class LengthBuckets:
    """Rearrangement of a random order into batches of similar lengths.

    The order is divided into mega-batches (``MegaBatchSampler`` of fairseq, ``group_by_length`` of transformers). The
    samples of a mega-batch are sorted by length and divided into batches, whose order is random. Batches of every
    length thus occur throughout an epoch: there is no length curriculum. Samples of equal length keep their random
    order. The incomplete batch at the end of an epoch is not rearranged, so that its samples, which weigh more, are not
    always the longest ones.

    Args:
        lengths: ``(n,)`` sort key of each sample, see :func:`sort_key`.
        batches: Number of batches per mega-batch.
    """

    lengths: np.ndarray
    batches: int

    def arranged(self, order: np.ndarray, size: int, seed: int) -> np.ndarray:
        """Rearrange an order, whose consecutive blocks of ``size`` rows are the batches.

        Args:
            order: ``(n,)`` a permutation of the rows.
            size: Batch size.
            seed: Seed of the order of batches.

        Returns:
            ``(n,)`` a permutation of the rows, determined by the arguments.
        """
        generator = torch.Generator().manual_seed(seed)
        full = len(order) // size * size
        parts = [order[full:]]
        for start in reversed(range(0, full, self.batches * size)):
            rows = order[start : min(full, start + self.batches * size)]
            batches = rows[np.argsort(self.lengths[rows], kind="stable")].reshape(-1, size)
            parts.append(batches[torch.randperm(len(batches), generator=generator).numpy()].reshape(-1))
        return np.concatenate(parts[::-1])

    @property
    def fingerprint(self) -> list[int]:
        """Number of batches and CRC-32 of the lengths, which determine the order in addition to the seed."""
        return [self.batches, zlib.crc32(self.lengths.astype("<i8").tobytes())]


def sort_key(texts: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return a sort key by input length, then by target length.

    Args:
        texts: ``(n,)`` input lengths in tokens.
        targets: ``(n,)`` target lengths in tokens.
    """
    return texts.astype(np.int64) * (int(targets.max(initial=0)) + 1) + targets


def longest(lengths: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the greatest length of each sample's answers, 0 for a sample without answers.

    Args:
        lengths: Lengths of the concatenated answers of all samples.
        offsets: ``(n + 1,)``: the answers of row ``i`` are ``offsets[i]`` to ``offsets[i + 1]``.
    """
    found = np.zeros(len(offsets) - 1, dtype=np.int64)
    filled = np.flatnonzero(np.diff(offsets))
    if len(filled):
        found[filled] = np.maximum.reduceat(lengths[: offsets[-1]], offsets[filled])
    return found
