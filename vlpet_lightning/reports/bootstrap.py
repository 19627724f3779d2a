"""Paired bootstrap over test questions, and over questions and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlpet_lightning.reports.questions import Questions

RESAMPLES = 10_000
SEED = 0
CHUNK = 1 << 22  # questions that are drawn at a time
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """Difference of two scores with percentile bootstrap intervals.

    Args:
        difference: Difference of the means over seeds.
        questions: Ends of the 95 % interval if the test questions are resampled, for the trained models as they are.
        seeds: The same if seeds are resampled too; None if a side has a single run.
    """

    difference: float
    questions: tuple[float, float]
    seeds: tuple[float, float] | None

    @property
    def widest(self) -> tuple[float, float]:
        """The interval over questions and seeds; that over questions where there is a single run."""
        return self.questions if self.seeds is None else self.seeds

    @property
    def excludes_zero(self) -> bool:
        """Whether the widest interval excludes 0."""
        low, high = self.widest
        return low > 0 or high < 0


def resampled_means(scores: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return the means of resampled questions.

    Args:
        scores: ``(runs, Q)``.
        resamples: Number of resamples ``R``.
        rng: Source of the draws.

    Returns:
        ``(R, runs)``; each resample draws the same questions for all runs, which makes the comparison paired.
    """
    count = scores.shape[1]
    found = np.empty((resamples, len(scores)))
    step = max(1, CHUNK // count)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(count, size=(rows, count))
        offsets = np.arange(rows)[:, None] * count
        times = np.bincount((drawn + offsets).ravel(), minlength=rows * count).reshape(rows, count)
        found[start : start + rows] = times @ scores.T / count
    return found


class Bootstrap:
    """Resampled scores of runs, from which any two groups of them can be compared.

    Args:
        tasks: Scores by task, for the same runs in the same order.
        resamples: Number of resamples.
        seed: Seed of the draws.
    """

    def __init__(self, tasks: Mapping[str, Questions], resamples: int = RESAMPLES, seed: int = SEED) -> None:
        rng = np.random.default_rng(seed)
        self.resamples = resamples
        self.seed = seed
        self.means = {name: found.scores.mean(axis=1) for name, found in tasks.items()}
        self.drawn = {name: resampled_means(found.scores, resamples, rng) for name, found in tasks.items()}

    def compare(self, one: Sequence[int], other: Sequence[int], tasks: Sequence[str]) -> Interval:
        """Compare the mean over tasks and runs of two groups.

        Args:
            one: Indices of the runs of the first group.
            other: Indices of the runs of the second.
            tasks: A task, or several whose scores are averaged; tasks are resampled independently.
        """
        means = np.mean([self.means[task] for task in tasks], axis=0)
        drawn = np.mean([self.drawn[task] for task in tasks], axis=0)
        over_questions = drawn[:, one].mean(axis=1) - drawn[:, other].mean(axis=1)
        seeds = None
        if len(one) > 1 and len(other) > 1:
            rng = np.random.default_rng((self.seed, 1))
            seeds = _ends(self._with_seeds(drawn, one, rng) - self._with_seeds(drawn, other, rng))
        return Interval(float(means[one].mean() - means[other].mean()), _ends(over_questions), seeds)

    def _with_seeds(self, drawn: np.ndarray, runs: Sequence[int], rng: np.random.Generator) -> np.ndarray:
        """Return the resampled mean of a group with its runs resampled too."""
        chosen = rng.integers(len(runs), size=(self.resamples, len(runs)))
        return np.take_along_axis(drawn[:, runs], chosen, axis=1).mean(axis=1)


def _ends(differences: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
