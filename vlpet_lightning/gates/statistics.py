"""Statistics of gates over a whole split, computed batch by batch: no factors are kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlpet_lightning.pet import FullGate, LargeGate, MiddleXGate, MiddleYGate, SelfGated, SmallGate

LIMIT = 2.0  # end of the histogram: the largest factor of a gate that starts as the identity
BINS = 256  # a power of two, so that the bin of a factor is exact
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NEAR = 0.1  # distance from 0 or 1 that counts as near
CONSTANT = 1e-14  # a variance below it is rounding, of factors in float32
SATURATED = 0.05  # part of a gate's range, at either end


def limits(gate: nn.Module) -> tuple[float, float] | None:
    """Return the range of a gate's factors; None if it is unbounded or unknown."""
    if isinstance(gate, MiddleYGate):
        return (gate.scale, 2 * gate.scale) if gate.form == "paper" else None
    if isinstance(gate, LargeGate | FullGate | MiddleXGate | SmallGate):
        return 0.0, gate.scale
    return (0.0, 1.0) if isinstance(gate, SelfGated) else None


@dataclass
class Running:
    """Mean and variance of a stream of numbers in float64 (Chan, Golub, LeVeque 1979).

    Args:
        weight: Sum of weights; without weights, the count.
        mean: Mean so far.
        squares: Weighted sum of squared distances from the mean.
    """

    weight: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Add numbers, optionally with weights of the same shape."""
        values = values.double()
        weights = torch.ones_like(values) if weights is None else weights.double()
        total = weights.sum()
        if total == 0:
            return
        mean = (values * weights).sum() / total
        squares = ((values - mean).square() * weights).sum()
        self.merge(Running(*torch.stack([total, mean, squares]).tolist()))

    def merge(self, other: Running) -> None:
        """Add the numbers of another stream."""
        if other.weight == 0:
            return
        total, shift = self.weight + other.weight, other.mean - self.mean
        self.squares += other.squares + shift**2 * self.weight * other.weight / total
        self.mean += shift * other.weight / total
        self.weight = total

    @property
    def variance(self) -> float:
        """Population variance."""
        return self.squares / self.weight if self.weight else 0.0


@dataclass
class Moments:
    """Statistics of a stream of factors.

    Args:
        range: Range of the gate, for ``saturated``; None if it has none.
        running: Mean and variance.
        least: Smallest factor.
        most: Largest factor.
        near_0: Number of factors less than :data:`NEAR` away from 0.
        near_1: The same for 1.
        saturated: Number of factors in the outer :data:`SATURATED` of the range, at either end.
        histogram: Counts below 0, in :data:`BINS` equal bins over [0, 2], and above 2.
    """

    range: tuple[float, float] | None = None
    running: Running = field(default_factory=Running)
    least: float = float("inf")
    most: float = float("-inf")
    near_0: int = 0
    near_1: int = 0
    saturated: int = 0
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(BINS + 2, np.int64))

    def add(self, factors: Tensor) -> None:
        """Add factors of any shape."""
        values = factors.detach().float().flatten()
        if not len(values):
            return
        self.running.add(values)
        counts = [(values.abs() < NEAR).sum(), ((values - 1).abs() < NEAR).sum()]
        if self.range is not None:
            low, high = self.range
            edge = SATURATED * (high - low)
            counts.append(((values < low + edge) | (values > high - edge)).sum())
        near_0, near_1, *saturated = torch.stack(counts).tolist()
        self.near_0 += near_0
        self.near_1 += near_1
        self.saturated += sum(saturated)
        least, most = torch.stack(torch.aminmax(values)).tolist()
        self.least, self.most = min(self.least, least), max(self.most, most)
        bins = (values * (BINS / LIMIT)).floor().clamp(-1, BINS) + 1
        bins = torch.where(values == LIMIT, float(BINS), bins)  # the last bin includes its end
        self.histogram += torch.bincount(bins.long(), minlength=BINS + 2).cpu().numpy()

    def merge(self, other: Moments) -> None:
        """Add the factors of another stream of the same gate."""
        self.range = self.range or other.range
        self.running.merge(other.running)
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)
        self.near_0 += other.near_0
        self.near_1 += other.near_1
        self.saturated += other.saturated
        self.histogram = self.histogram + other.histogram

    @property
    def count(self) -> int:
        """Number of factors."""
        return int(self.running.weight)

    @property
    def constant(self) -> bool:
        """Whether all factors are equal, up to rounding."""
        return self.running.variance <= CONSTANT

    def quantile(self, share: float) -> float:
        """Return a quantile, interpolated within a bin of the histogram: wrong by at most its width, 1/128."""
        edges = np.concatenate([[self.least], np.linspace(0, LIMIT, BINS + 1), [self.most]])
        cumulative = np.concatenate([[0], self.histogram.cumsum()])
        keep = np.concatenate([[True], self.histogram > 0])  # ends of empty bins would make the line flat
        starts = edges[:-1][self.histogram > 0]
        ends = edges[1:][self.histogram > 0]
        totals = cumulative[keep]
        place = min(int(np.searchsorted(totals, share * totals[-1], side="left")), len(totals) - 1)
        bin = max(place - 1, 0)
        inside = (share * totals[-1] - totals[bin]) / (totals[bin + 1] - totals[bin])
        value = starts[bin] + inside * (ends[bin] - starts[bin])
        return float(np.clip(value, self.least, self.most))

    def as_dict(self) -> dict[str, Any]:
        """Return the statistics as plain numbers; shares are parts of 1."""
        count = self.count
        return {
            "count": count,
            "mean": self.running.mean,
            "std": self.running.variance**0.5,
            "min": self.least,
            "max": self.most,
            **{f"q{round(100 * share):02d}": self.quantile(share) for share in QUANTILES},
            "near_0": self.near_0 / count,
            "near_1": self.near_1 / count,
            "saturated": None if self.range is None else self.saturated / count,
        }


@dataclass
class Variation:
    """Parts of the variance of ``G`` over real positions, by the granularity that could express them.

    The variance is that of ``(token, channel)`` pairs. It splits exactly into that of the means of samples (the small
    gate could express it), of the means of tokens around their sample's mean (middleX), of the means of channels
    (middleY), and the rest, which only a factor per token and channel can express (large).
    """

    total: Running = field(default_factory=Running)
    tokens: Running = field(default_factory=Running)
    samples: Running = field(default_factory=Running)
    channels: Tensor | None = None  # sums over tokens

    def add(self, factors: Tensor, real: Tensor) -> None:
        """Add the factors of a batch.

        Args:
            factors: Tensor that broadcasts over ``(B, S, d)``.
            real: ``(B, S)`` bool mask of the positions that count.
        """
        channels = factors.shape[-1]
        factors = factors.float().expand(*real.shape, channels)
        values = factors[real].double()  # (tokens, channels)
        self.total.add(values)
        means = factors.double().mean(dim=-1)
        self.tokens.add(means[real])
        lengths = real.sum(dim=1)
        self.samples.add((means * real).sum(dim=1) / lengths.clamp(min=1), lengths)
        sums = values.sum(dim=0)
        self.channels = sums if self.channels is None else self.channels + sums

    def shares(self) -> dict[str, float] | None:
        """Return the parts as shares of the variance; None if ``G`` is constant."""
        variance = self.total.variance
        if self.channels is None or variance <= CONSTANT:
            return None
        channel = float((self.channels / self.tokens.weight).var(unbiased=False)) if len(self.channels) > 1 else 0.0
        sample, token = self.samples.variance, self.tokens.variance
        return {
            "samples": sample / variance,
            "tokens": (token - sample) / variance,
            "channels": channel / variance,
            "rest": max(0.0, 1 - (token + channel) / variance),
        }


@dataclass
class PositionMeans:
    """Mean of ``G`` over samples and channels at each image position.

    Args:
        images: Images per sample.
        sums: Sums by position; clips may differ in their number of frames.
        counts: Number of samples with this position.
    """

    images: int = 1
    sums: np.ndarray = field(default_factory=lambda: np.zeros(0))
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, means: Tensor, real: Tensor) -> None:
        """Add ``(B, V)`` means over the channels, where ``real`` ``(B, V)`` is true."""
        longest = max(means.shape[1], len(self.sums))
        self.sums, self.counts = (np.pad(x, (0, longest - len(x))) for x in (self.sums, self.counts))
        self.sums[: means.shape[1]] += (means.double() * real).sum(dim=0).cpu().numpy()
        self.counts[: means.shape[1]] += real.sum(dim=0).cpu().numpy()

    def means(self) -> np.ndarray:
        """Return the mean at each position, NaN where there was none."""
        with np.errstate(invalid="ignore"):
            return self.sums / self.counts

    def grids(self) -> np.ndarray:
        """Return the means as ``(N, side, side)``, or ``(N, 1, F)`` if the positions form no square."""
        return as_grids(self.means(), self.images)


def as_grids(values: np.ndarray, images: int) -> np.ndarray:
    """Arrange ``V`` image positions as ``(N, side, side)``, or ``(N, 1, F)`` if they form no square."""
    tokens = len(values) // images
    side = int(tokens**0.5 + 0.5)
    return values.reshape(images, side, side) if side * side == tokens else values.reshape(images, 1, tokens)


def merged(parts: Iterable[Moments]) -> Moments:
    """Return the statistics of several streams together."""
    found = Moments()
    for part in parts:
        found.merge(part)
    return found
