"""Statistics of one checkpoint's gates, in the order in which tables, figures and the page show them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlpet_lightning.gates.collecting import ALL, Collector, Example, Place
from vlpet_lightning.gates.recording import KINDS, SEQUENCE_KINDS, TARGET_KINDS
from vlpet_lightning.gates.statistics import BINS, LIMIT, NEAR, SATURATED, Moments
from vlpet_lightning.tasks import TASKS

FORMAT = 1
ORDER = (*dict.fromkeys((*KINDS[:-1], *TARGET_KINDS[:-1], *SEQUENCE_KINDS[:-1])), ALL, "padding")
GRANULARITY = {  # by the axes along which factors can differ
    ("sample", "token", "channel"): "one factor per token and channel",
    ("sample", "token"): "one factor per token",
    ("sample",): "one factor per sample, the same at every position",
    ("channel",): "one factor per channel, the same for every input",
    (): "one factor, the same for every input",
}
FIXED_SHARES = {("sample",): "samples", ("channel",): "channels"}
SHARES = ("samples", "tokens", "channels", "rest")


@dataclass
class Result:
    """Statistics of a checkpoint.

    Args:
        name: Short name, unique among compared checkpoints.
        about: Facts about the checkpoint, as text by name.
        samples: Number of samples by task.
        gates: Name of the gate's class by site.
        axes: Axes along which factors can differ, by task, site and layer.
        cells: Statistics by task, site, layer and kind.
        shares: Parts of the variance by task, site and layer; None for a constant gate.
        positions: Means on the image grid, ``(N, side, side)``, by task, site and layer.
        examples: Samples with their image maps, by task.
    """

    name: str
    about: dict[str, str]
    samples: dict[str, int]
    gates: dict[str, str]
    axes: dict[Place, tuple[str, ...]]
    cells: dict[tuple[str, str, int, str], Moments]
    shares: dict[Place, dict[str, float] | None]
    positions: dict[Place, np.ndarray]
    examples: dict[str, list[Example]] = field(default_factory=dict)

    @classmethod
    def of(cls, collector: Collector, name: str, about: dict[str, str]) -> Result:
        """Return the result of a collector."""
        shares: dict[Place, dict[str, float] | None] = {}
        cells = collector.cells()
        for place, axes in collector.axes.items():
            if axes in FIXED_SHARES:
                constant = cells[(*place, ALL)].constant
                shares[place] = None if constant else {part: float(part == FIXED_SHARES[axes]) for part in SHARES}
            else:
                shares[place] = collector.variation[place].shares() if place in collector.variation else None
        positions = {place: found.grids() for place, found in collector.positions.items()}
        known = {place[0]: 0 for place in collector.axes}
        return cls(
            name,
            about,
            {task: collector.samples[task] for task in TASKS if task in known},
            collector.gates,
            collector.axes,
            cells,
            shares,
            positions,
            collector.examples,
        )

    @property
    def tasks(self) -> list[str]:
        """Tasks in the order of the benchmark."""
        return list(self.samples)

    @property
    def sites(self) -> list[str]:
        """Sites with gates, in the order of the placements."""
        return list(self.gates)

    def layers(self, site: str, task: str | None = None) -> list[int]:
        """Return the layers that have a gate at a site."""
        return sorted({layer for t, s, layer in self.axes if s == site and task in (None, t)})

    def kinds(self, site: str, task: str | None = None) -> list[str]:
        """Return the kinds of token that a site's gates tell apart; ``all`` alone if they are the same everywhere."""
        found = {kind for t, s, _, kind in self.cells if s == site and task in (None, t)}
        return [kind for kind in ORDER if kind in found]

    def mean(self, task: str, site: str, layer: int, kind: str) -> float:
        """Return the mean of a kind; that of ``all`` for gates that are the same at every position; else NaN."""
        found = self.cells.get((task, site, layer, kind))
        if found is None and "token" not in self.axes.get((task, site, layer), ("token",)):
            found = self.cells.get((task, site, layer, ALL))
        return float("nan") if found is None else found.running.mean

    def means(self, task: str, site: str, layers: list[int], kinds: list[str]) -> np.ndarray:
        """Return the ``(layers, kinds)`` means."""
        return np.array([[self.mean(task, site, layer, kind) for kind in kinds] for layer in layers])

    def granularity(self, site: str) -> str:
        """Describe along which axes the factors of a site's gates can differ."""
        axes = next(axes for (_, s, _), axes in self.axes.items() if s == site)
        return GRANULARITY.get(axes, f"factors differ by {', '.join(axes)}")

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the statistics of every cell, in the order of tasks, sites, layers and kinds."""
        for task in self.tasks:
            for site in self.sites:
                for layer in self.layers(site, task):
                    for kind in self.kinds(site, task):
                        if (cell := self.cells.get((task, site, layer, kind))) is not None:
                            place = {"task": task, "site": site, "layer": layer, "kind": kind}
                            yield {**place, "gate": self.gates[site], **cell.as_dict()}

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the examples' maps as plain data, for JSON."""
        histograms = {key: cell.histogram.tolist() for key, cell in self.cells.items()}
        return {
            "name": self.name,
            "about": self.about,
            "samples": self.samples,
            "gates": {site: {"class": self.gates[site], "granularity": self.granularity(site)} for site in self.sites},
            "cells": [
                {**row, "histogram": histograms[row["task"], row["site"], row["layer"], row["kind"]]}
                for row in self.rows()
            ],
            "layers": [
                {"task": task, "site": site, "layer": layer, "mean": self.mean(task, site, layer, ALL), "variation": v}
                for (task, site, layer), v in self.shares.items()
            ],
            "positions": [
                {"task": task, "site": site, "layer": layer, "means": _without_nan(grid)}
                for (task, site, layer), grid in self.positions.items()
            ],
            "examples": {task: [example.id for example in found] for task, found in self.examples.items()},
        }


def _without_nan(values: np.ndarray) -> Any:
    plain = values.astype(object)
    plain[np.isnan(values)] = None
    return plain.tolist()


def document(results: list[Result], split: str, limit: int | None) -> dict[str, Any]:
    """Return the content of ``gates.json``."""
    return {
        "format": FORMAT,
        "split": split,
        "limit": limit,
        "histogram": {"bins": BINS, "range": [0, LIMIT], "counts": "below, bins, above"},
        "near": NEAR,
        "saturated": SATURATED,
        "runs": [result.as_dict() for result in results],
    }


def differences(first: Result, second: Result) -> Iterator[tuple[str, str, int, str, float, float]]:
    """Yield task, site, layer, kind and both means, wherever both checkpoints have a gate.

    Kinds are those that either of the two tells apart.
    """
    for task in (task for task in first.tasks if task in second.tasks):
        for site in (site for site in first.sites if site in second.sites):
            both = [layer for layer in first.layers(site, task) if layer in second.layers(site, task)]
            for layer in both:
                for kind in common_kinds(first, second, site, task):
                    means = first.mean(task, site, layer, kind), second.mean(task, site, layer, kind)
                    if not np.isnan(means).any():
                        yield task, site, layer, kind, *means


def common_kinds(first: Result, second: Result, site: str, task: str) -> list[str]:
    """Return the kinds of a site that either checkpoint tells apart."""
    found = {*first.kinds(site, task), *second.kinds(site, task)}
    return [kind for kind in ORDER if kind in found]
