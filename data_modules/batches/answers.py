"""Drawing of the training answer of each sample: by score, stateless and reproducible."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

_U64 = np.uint64


class AnswerDraw:
    """Draw of one answer per sample, with probability proportional to its score (``vqa_clip_data.py``, __getitem__).

    The draw depends on question id, seed and epoch only: it is the same on any number of workers and ranks, and in a
    resumed run.

    Args:
        ids: ``n`` question ids.
        scores: Concatenated answer scores of all samples.
        offsets: ``(n + 1,)``: the answers of row ``i`` are ``offsets[i]`` to ``offsets[i + 1]``.
        seed: The run's seed.
        by_epoch: Whether the draw depends on seed and epoch. If not, a question has the same answer in every epoch of
            every run. This is the original's effective behaviour: its workers draw the same numbers in each epoch.
    """

    def __init__(
        self, ids: Sequence[str], scores: np.ndarray, offsets: np.ndarray, *, seed: int = 0, by_epoch: bool = True
    ) -> None:
        self.scores = scores
        self.offsets = offsets
        self.seed = seed
        self.by_epoch = by_epoch
        self.ends = np.cumsum(scores, dtype=np.float64)
        single = bool((np.diff(offsets) <= 1).all())
        self.keys = None if single else np.fromiter(map(_key, ids), dtype=_U64, count=len(ids))

    def __call__(self, rows: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw the answers of some samples.

        Args:
            rows: ``(B,)`` row numbers.
            epoch: The epoch.

        Returns:
            ``(B,)`` int64 answer indices, -1 for a sample without an answer of positive score, and their ``(B,)``
            float32 scores (0 for index -1).
        """
        if not len(self.scores):
            return np.full(len(rows), -1), np.zeros(len(rows), dtype=np.float32)
        first, last = self.offsets[rows], self.offsets[rows + 1] - 1
        before = np.where(first > 0, self.ends[first - 1], 0.0)
        total = np.where(last >= first, self.ends[last], before) - before
        chosen = first
        if self.keys is not None:
            at = before + self._uniform(self.keys[rows], epoch) * total
            # side="right" skips equal ends, so an answer of score 0 is never drawn
            chosen = np.clip(np.searchsorted(self.ends, at, side="right"), first, np.maximum(first, last))
        chosen = np.where(total > 0, chosen, -1)
        return chosen, np.where(chosen >= 0, self.scores[chosen], 0).astype(np.float32)

    def _uniform(self, keys: np.ndarray, epoch: int) -> np.ndarray:
        salt = _mix(_mix(np.array([self.seed % 2**64], dtype=_U64)) + _U64(epoch)) if self.by_epoch else _U64(0)
        return (_mix(keys ^ salt) >> _U64(11)).astype(np.float64) / 2**53


def best_answers(scores: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the highest-scoring answer of each sample; ties go to the first.

    Args:
        scores: Concatenated answer scores of all samples.
        offsets: ``(n + 1,)``: the answers of row ``i`` are ``offsets[i]`` to ``offsets[i + 1]``.

    Returns:
        ``(n,)`` int64 answer indices, -1 for a sample without an answer of positive score.
    """
    counts = np.diff(offsets)
    best = np.full(len(counts), -1)
    filled = np.flatnonzero(counts)
    # sorted by sample, then by descending score: the best answer comes first in each sample
    order = np.lexsort((-scores, np.repeat(np.arange(len(counts)), counts)))
    best[filled] = order[offsets[filled]]
    best[filled] = np.where(scores[best[filled]] > 0, best[filled], -1)
    return best


def _key(id: str) -> int:
    return int.from_bytes(blake2b(id.encode(), digest_size=8).digest(), "little")


def _mix(values: np.ndarray) -> np.ndarray:
    """One splitmix64 step (Steele, Lea and Flood, OOPSLA 2014): each input bit flips half of the output bits."""
    values = values + _U64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> _U64(27))) * _U64(0x94D049BB133111EB)
    return values ^ (values >> _U64(31))
