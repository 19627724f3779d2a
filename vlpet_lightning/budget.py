"""Search for the ranks and sites of a method that meet a budget of trained parameters.

The number of trained parameters grows with a rank, for nearly all units linearly. The search therefore interpolates
between counted points, and ends when it has counted two neighbouring ranks with the budget between them; it assumes
only that the number grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from vlpet_lightning.pet.ranks import Path, Rank, ranks_in, trusted, with_ranks
from vlpet_lightning.pet.serialization import placements_from_plain

DIGITS = 2  # of a percentage in the published tables
ALL = "all"
TOGETHER = "in proportion"
Plain = list[dict[str, Any]]  # placements as plain data


class Counts(NamedTuple):
    """Number of trained parameters and of all parameters, added modules included."""

    trained: int
    total: int

    @property
    def percent(self) -> float:
        """Trained parameters in percent of all."""
        return 100 * self.trained / self.total


@dataclass(frozen=True)
class Budget:
    """A number of trained parameters, or their share.

    Args:
        percent: Percent of all parameters, as in :class:`vlpet_lightning.parameters.ParameterReport`.
        parameters: Number of trained parameters; exactly one of the two is given.

    Raises:
        ValueError: If neither or both are given, or the number is out of range.
    """

    percent: Decimal | None = None
    parameters: int | None = None

    def __post_init__(self) -> None:
        if (self.percent is None) == (self.parameters is None):
            raise ValueError("a budget is a percentage or a number of parameters: give exactly one of the two")
        if self.percent is not None and not (self.percent.is_finite() and 0 < self.percent <= 100):
            raise ValueError(f"percent must be above 0 and at most 100, got {self.percent}")
        if self.parameters is not None and self.parameters < 1:
            raise ValueError(f"parameters must be 1 or more, got {self.parameters}")

    @property
    def digits(self) -> int:
        """Digits after the decimal point to which a percentage has to match: those given, at least 2."""
        exponent = 0 if self.percent is None else int(self.percent.as_tuple().exponent)
        return max(DIGITS, -exponent)

    def excess(self, counts: Counts) -> Fraction:
        """Return by how many parameters the counts exceed the budget; linear in both counts."""
        if self.parameters is not None:
            return Fraction(counts.trained - self.parameters)
        return counts.trained - Fraction(self.percent or 0) / 100 * counts.total

    def distance(self, counts: Counts) -> float:
        """Return the difference to the budget, in percentage points or parameters, with its sign."""
        if self.parameters is not None:
            return counts.trained - self.parameters
        return counts.percent - float(self.percent or 0)

    def is_met(self, counts: Counts) -> bool:
        """Whether the counts equal the budget: a number exactly, a percentage to its :attr:`digits`."""
        if self.parameters is not None:
            return counts.trained == self.parameters
        return f"{counts.percent:.{self.digits}f}" == f"{self.percent:.{self.digits}f}"

    def __str__(self) -> str:
        return f"{self.parameters:,} parameters" if self.percent is None else f"{self.percent} %"

    def show(self, counts: Counts) -> str:
        """Format counts in the budget's unit."""
        return f"{counts.trained:,}" if self.percent is None else f"{counts.percent:.{self.digits}f} %"


@dataclass(frozen=True)
class Family:
    """Placements that differ in one factor: the scale of some of their ranks.

    Args:
        placements: Plain data with the ranks of the method's file.
        varied: The ranks that change, as value per unit of scale.
        sites: Short name of the sites.
        ranks: Short name of the ranks that change.
    """

    placements: Plain
    varied: Mapping[Path, int]
    sites: str
    ranks: str

    def at(self, scale: int) -> Plain:
        """Return the placements at a scale of 1 or more."""
        return with_ranks(self.placements, {path: step * scale for path, step in self.varied.items()})


@dataclass(frozen=True)
class Candidate:
    """Placements with their counts.

    Args:
        placements: Plain data.
        counts: Counts of the model that has them.
        sites: Short name of the sites.
        ranks: Short name of the ranks that were searched.
    """

    placements: Plain
    counts: Counts
    sites: str
    ranks: str

    @property
    def keeps_method(self) -> bool:
        """Whether it has all sites of the method, and ranks in the method's ratios except for at most one."""
        return self.sites == ALL and self.ranks.startswith(TOGETHER)

    def key(self) -> str:
        """Return a text that is equal for equal placements."""
        return repr(self.placements)


def sites_of(placements: Plain) -> list[str]:
    """Return the names of all sites, in order."""
    return [site for placement in placements for site in placement["at"]]


def at_sites(placements: Plain, sites: Sequence[str]) -> Plain:
    """Return the placements without all other sites."""
    kept = [{**p, "at": [site for site in p["at"] if site in sites]} for p in placements]
    return [placement for placement in kept if placement["at"]]


def subsets(sites: Sequence[str]) -> dict[str, list[str]]:
    """Name the subsets of sites that one part of their names selects or removes; all of them come first.

    >>> subsets(["encoder.attn", "encoder.ffn", "decoder.cross.value"])["encoder only"]
    ['encoder.attn', 'encoder.ffn']
    """
    found = {ALL: list(sites)}
    parts = list(dict.fromkeys(part for site in sites for part in site.split(".")))
    for part in parts:
        found[f"{part} only"] = [site for site in sites if part in site.split(".")]
    for part in parts:
        found[f"without {part}"] = [site for site in sites if part not in site.split(".")]
    seen: set[tuple[str, ...]] = {()}
    return {name: some for name, some in found.items() if not (tuple(some) in seen or seen.add(tuple(some)))}  # type: ignore[func-returns-value]


def steps(ranks: Mapping[Path, Rank]) -> dict[Path, int]:
    """Divide ranks by their greatest common divisor, so that their multiples keep the ratios."""
    divisor = reduce(math.gcd, (rank.value for rank in ranks.values()), 0)
    return {path: rank.value // divisor for path, rank in ranks.items()}


def groups(placements: Plain) -> dict[str, dict[Path, Rank]]:
    """Group ranks that have the same class, name and value, by a short name."""
    found: dict[Rank, dict[Path, Rank]] = {}
    for path, rank in ranks_in(placements).items():
        found.setdefault(rank, {})[path] = rank
    return {f"{rank.unit} {rank.name}" + _suffix(rank, found): members for rank, members in found.items()}


def _suffix(rank: Rank, all_ranks: Mapping[Rank, Any]) -> str:
    """Distinguish ranks of the same class and name by their value in the method's file."""
    alike = [other for other in all_ranks if (other.unit, other.name) == (rank.unit, rank.name)]
    return f" {rank.value}" if len(alike) > 1 else ""


def families(placements: Plain) -> Iterator[Family]:
    """Yield the families of a method: its ranks in proportion at all sites, at fewer sites, then each rank alone."""
    for name, sites in subsets(sites_of(placements)).items():
        some = at_sites(placements, sites)
        ranks = ranks_in(some)
        if ranks:
            yield Family(some, steps(ranks), name, TOGETHER)
    parts = groups(placements)
    if len(parts) > 1:
        for name, members in parts.items():
            yield Family(placements, dict.fromkeys(members, 1), ALL, f"{name} alone")


class NoValues(TorchFunctionMode):
    """Skip ``torch.nn.init``, which takes half of the time of building a model on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class Search:
    """Search of families for a budget.

    Args:
        count: Builds a model with placements and counts its parameters.
        widths: Number of channels of each site.
        budget: The budget.
        limit: Largest rank; by default the width of the widest site of a family, or the rank in the method's file if
            that is larger.
    """

    def __init__(
        self, count: Callable[[Plain], Counts], widths: Mapping[str, int], budget: Budget, limit: int | None = None
    ) -> None:
        self._count = count
        self._widths = widths
        self._limit = limit
        self.budget = budget
        self._known: dict[str, Counts] = {}

    def counts(self, placements: Plain) -> Counts:
        """Count, once for equal placements."""
        key = repr(placements)
        if key not in self._known:
            self._known[key] = self._count(placements)
        return self._known[key]

    def accepts(self, placements: Plain) -> bool:
        """Whether all units accept their ranks; a constructor refuses, for instance, what its heads do not divide."""
        try:
            with torch.device("meta"), NoValues():
                for placement in placements_from_plain(placements, trusted(placements)):
                    for width in {self._widths[site] for site in placement.at}:
                        placement.unit(width)
        except ValueError:
            return False
        return True

    def largest_scale(self, family: Family) -> int:
        """Return the scale at which the first rank of a family reaches the limit; 0 if a fixed rank exceeds it."""
        ranks = ranks_in(family.placements)
        if self._limit and any(rank.value > self._limit for path, rank in ranks.items() if path not in family.varied):
            return 0
        width = max(self._widths[site] for site in sites_of(family.placements))
        return min((self._limit or max(width, ranks[path].value)) // step for path, step in family.varied.items())

    def _next(self, family: Family, start: int, stop: int) -> int | None:
        """Return the first scale from ``start`` to ``stop``, inclusive and in this direction, that units accept."""
        step = 1 if stop >= start else -1
        return next((k for k in range(start, stop + step, step) if self.accepts(family.at(k))), None)

    def ends(self, family: Family) -> tuple[int, int] | None:
        """Return the least and largest scale; None if no scale within the limit is accepted."""
        most = self.largest_scale(family)
        first = self._next(family, 1, most) if most else None
        last = None if first is None else self._next(family, most, first)
        return None if first is None or last is None else (first, last)

    def bracket(self, family: Family) -> tuple[int, int] | None:
        """Find the neighbouring scales below and above the budget, or twice the end that is nearest to it.

        Returns:
            Two scales; None if the family has none, or its ranks do not change what is trained.
        """
        found = self.ends(family)
        if found is None:
            return None
        low, high = found
        least, most = (self.counts(family.at(k)) for k in (low, high))
        if low < high and least.trained == most.trained:
            return None
        below, above = self.budget.excess(least), self.budget.excess(most)
        if below >= 0:
            return low, low
        if above <= 0:
            return high, high
        while True:
            guess = min(max(low + math.floor((high - low) * (-below) / (above - below)), low), high - 1)
            left = self._next(family, guess, low)
            right = self._next(family, guess + 1, high)
            assert left is not None  # both ends are accepted
            assert right is not None
            under, over = (self.budget.excess(self.counts(family.at(k))) for k in (left, right))
            if under <= 0 <= over:
                return left, right
            if under > 0:
                high, above = left, under
            else:
                low, below = right, over

    def nearest(self, family: Family) -> Candidate | None:
        """Return the member of a family that is nearest to the budget; None if it has none."""
        scales = self.bracket(family)
        if scales is None:
            return None
        made = [
            Candidate(family.at(k), self.counts(family.at(k)), family.sites, family.ranks)
            for k in dict.fromkeys(scales)
        ]
        return min(made, key=lambda candidate: abs(self.budget.distance(candidate.counts)))

    def adjusted(self, family: Family) -> Iterator[Candidate]:
        """Yield members of a family in which one rank is adjusted, so that they come nearer to the budget."""
        scales = self.bracket(family)
        for scale in () if scales is None else dict.fromkeys(scales):
            members = groups(family.placements)
            for name, ranks in members.items() if len(members) > 1 else ():
                around = Family(
                    family.at(scale), dict.fromkeys(ranks, 1), family.sites, f"{family.ranks}, {name} adjusted"
                )
                found = self.nearest(around)
                if found is not None:
                    yield found

    def range(self, all_families: Sequence[Family]) -> tuple[Counts, Counts] | None:
        """Return the counts nearest to 0 and farthest from it that any family reaches; None if there are none."""
        reached = [self.counts(family.at(k)) for family in all_families for k in dict.fromkeys(self.ends(family) or ())]
        return (min(reached), max(reached)) if reached else None
