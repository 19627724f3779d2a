"""Figures of gates. Every colour map is cividis, which reads the same in grey and for colour-blind readers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # works without a display
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from vlpet_lightning.gates.collecting import ALL, Example
from vlpet_lightning.gates.results import SHARES, Result, common_kinds
from vlpet_lightning.gates.statistics import BINS, LIMIT, as_grids
from vlpet_lightning.vision.images import read_image

MAP = "cividis"
SIDE = 224  # pixels of an example image
GAP = 6  # white pixels between two images
CLEAR = 0.62  # opacity of an overlay
LINES: dict[str, tuple[str, Any, float]] = {  # colour (Okabe and Ito), dashes and width by kind
    "prompt": ("#CC79A7", "-.", 1.2),
    "text": ("#0072B2", "-", 1.3),
    "image": ("#D55E00", "--", 1.6),
    "target": ("#0072B2", "-", 1.3),
    "template": ("#CC79A7", "-.", 1.2),
    "answer": ("#009E73", (0, (5, 1)), 1.4),
    "padding": ("#888888", ":", 1.4),
    ALL: ("black", "-", 1.3),
}
PARTS = {  # label, grey and hatch of a part of the variance
    "samples": ("between samples (small)", "#1a1a1a", ""),
    "tokens": ("between tokens of a sample (middleX)", "#6e6e6e", "//"),
    "channels": ("between channels (middleY)", "#b5b5b5", ".."),
    "rest": ("token and channel together (large only)", "#ececec", ""),
}


def save(figure: Figure, path: Path, *, vector: bool = True) -> list[Path]:
    """Write a figure as PNG, and as SVG if ``vector``; equal figures give equal files.

    Args:
        figure: Figure, closed afterwards.
        path: File name without suffix.
        vector: Whether to write the SVG.
    """
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # questions and names may contain dollar signs
    written = [path.with_name(f"{path.name}.png")]
    figure.savefig(written[0], dpi=110, metadata={"Software": None})
    if vector:
        figure.set_layout_engine("none")  # keeps the layout that the PNG has
        written.append(path.with_name(f"{path.name}.svg"))
        with matplotlib.rc_context({"svg.hashsalt": "vlpet", "svg.fonttype": "none"}):
            figure.savefig(written[1], metadata={"Date": None})
    plt.close(figure)
    return written


def _span(values: Sequence[np.ndarray]) -> Normalize:
    """Return one colour scale for several arrays, at least 0.01 wide so that rounding is not shown as contrast."""
    found = np.concatenate([np.ravel(some) for some in values])
    found = found[np.isfinite(found)]
    low, high = (float(found.min()), float(found.max())) if len(found) else (0.0, 1.0)
    centre, half = (low + high) / 2, max((high - low) / 2, 0.005)
    return Normalize(centre - half, centre + half)


def _title(figure: Figure, text: str) -> None:
    """Set the title of a figure, in as many lines as its width needs."""
    width = int(14 * figure.get_figwidth())
    figure.suptitle("\n".join(textwrap.wrap(text, width)), fontsize=9)


def _heat(axis: Axes, values: np.ndarray, layers: Sequence[int], kinds: Sequence[str], norm: Any, form: str) -> Any:
    image = axis.imshow(values, cmap=MAP, norm=norm, aspect="auto")
    axis.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
    axis.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if norm(value) < 0.55 else "black"
            axis.text(column, row, format(value, form), ha="center", va="center", fontsize=8, color=colour)
    return image


def kinds(result: Result, task: str) -> Figure:
    """Draw the mean of G by layer and kind of token, one panel per site."""
    sites = [site for site in result.sites if result.layers(site, task)]
    tables = [result.means(task, s, result.layers(s, task), result.kinds(s, task)) for s in sites]
    widths = [1 + len(result.kinds(site, task)) for site in sites]
    height = 1.6 + 0.32 * max(len(table) for table in tables)
    figure, axes = plt.subplots(
        1,
        len(sites),
        figsize=(1.5 + 0.72 * sum(widths), height),
        squeeze=False,
        layout="constrained",
        width_ratios=widths,
    )
    norm = _span(tables)
    for axis, site, table in zip(axes[0], sites, tables, strict=True):
        image = _heat(axis, table, result.layers(site, task), result.kinds(site, task), norm, ".3f")
        axis.set_title(f"{site}\n{result.gates[site]}", fontsize=9)
        axis.set(xlabel="kind of token", ylabel="layer" if axis is axes[0, 0] else "")
    figure.colorbar(image, ax=list(axes[0]), label="mean of G")
    _title(figure, f"{task}: mean gate by layer and kind of token")
    return figure


def compared(first: Result, second: Result, task: str) -> Figure | None:
    """Draw the means of two checkpoints and their difference, one column per site; None if no site has both."""
    sites = [site for site in first.sites if first.layers(site, task) and second.layers(site, task)]
    if not sites:
        return None
    layers = {s: [n for n in first.layers(s, task) if n in second.layers(s, task)] for s in sites}
    names = {site: common_kinds(first, second, site, task) for site in sites}
    both = [[some.means(task, site, layers[site], names[site]) for site in sites] for some in (first, second)]
    both.append([two - one for one, two in zip(*both, strict=True)])
    widths = [1 + len(names[site]) for site in sites]
    height = 3 * (1.3 + 0.3 * max(map(len, layers.values())))
    figure, axes = plt.subplots(
        3,
        len(sites),
        figsize=(1.8 + 0.78 * sum(widths), height),
        squeeze=False,
        layout="constrained",
        width_ratios=widths,
    )
    scales = [_span([*both[0], *both[1]])] * 2 + [_span([np.abs(t) * sign for t in both[2] for sign in (1, -1)])]
    labels = [f"mean of G\n{first.name}", f"mean of G\n{second.name}", f"{second.name}\nminus {first.name}"]
    for row in range(3):
        for axis, site, table in zip(axes[row], sites, both[row], strict=True):
            image = _heat(axis, table, layers[site], names[site], scales[row], "+.3f" if row == 2 else ".3f")
            gates = f"{first.gates[site]}, {second.gates[site]}"
            axis.set_title(f"{site}\n{gates}" if row == 0 else "", fontsize=9)
            axis.set(
                xlabel="kind of token" if row == 2 else "",
                ylabel=f"layer\n({['first', 'second', 'second - first'][row]})" if axis is axes[row, 0] else "",
            )
        figure.colorbar(image, ax=list(axes[row])).set_label(labels[row], fontsize=8)
    _title(figure, f"{task}: two checkpoints by layer and kind of token")
    return figure


def distributions(result: Result, task: str) -> Figure:
    """Draw the distribution of G by kind of token: one row per site, one column per layer."""
    sites = [site for site in result.sites if result.layers(site, task)]
    columns = max(len(result.layers(site, task)) for site in sites)
    figure, axes = plt.subplots(
        len(sites),
        columns,
        figsize=(1 + 1.9 * columns, 0.8 + 1.8 * len(sites)),
        squeeze=False,
        layout="constrained",
        sharex="row",
    )
    handles: dict[str, Any] = {}
    for row, site in zip(axes, sites, strict=True):
        cells = {key: cell for key, cell in result.cells.items() if key[:2] == (task, site)}
        low, high = min(c.least for c in cells.values()), max(c.most for c in cells.values())
        merge = _bins_per_step(low, high)
        for axis, layer in zip(row, result.layers(site, task), strict=False):
            for kind in result.kinds(site, task):
                cell = cells.get((task, site, layer, kind))
                if cell is None or (kind == ALL and len(result.kinds(site, task)) > 1):
                    continue
                counts = cell.histogram[1:-1].reshape(-1, merge).sum(axis=1)
                width = merge * LIMIT / BINS
                edges = np.linspace(0, LIMIT, len(counts) + 1)
                colour, dashes, line = LINES[kind]
                density = counts / cell.count / width
                handles[kind] = axis.stairs(density, edges, color=colour, linestyle=dashes, linewidth=line)
            axis.set_title(f"layer {layer}", fontsize=8)
            axis.set_xlim(max(0, low - 0.02), min(LIMIT, high + 0.02))
            axis.tick_params(labelsize=7)
            axis.set_yticks([])
        row[0].set_ylabel(f"{site}\ndensity", fontsize=8)
        for axis in row[len(result.layers(site, task)) :]:
            axis.axis("off")
    for axis in axes[-1]:
        axis.set_xlabel("G", fontsize=8)
    figure.legend(handles.values(), handles, loc="outside right upper", fontsize=8)
    _title(figure, f"{task}: distribution of G per layer")
    return figure


def _bins_per_step(low: float, high: float) -> int:
    """Return how many bins one step of a curve joins: about 60 steps over the range that occurs."""
    steps = max(1.0, (min(high, LIMIT) - max(low, 0)) * BINS / LIMIT / 60)
    return int(2 ** round(np.log2(steps)))


def variation(result: Result) -> Figure | None:
    """Draw the parts of the variance of G by granularity, one panel per task; None if every gate is constant."""
    rows = [(site, layer) for site in result.sites for layer in result.layers(site)][::-1]
    if not any(shares for shares in result.shares.values()):
        return None
    figure, axes = plt.subplots(
        1,
        len(result.tasks),
        figsize=(2.2 + 2.3 * len(result.tasks), 1.6 + 0.26 * len(rows)),
        squeeze=False,
        layout="constrained",
        sharey=True,
    )
    handles = {}
    for axis, task in zip(axes[0], result.tasks, strict=True):
        left = np.zeros(len(rows))
        for part in SHARES:
            label, grey, hatch = PARTS[part]
            found = [result.shares.get((task, *row)) or {} for row in rows]
            widths = np.array([100 * shares.get(part, 0.0) for shares in found])
            handles[label] = axis.barh(
                range(len(rows)), widths, left=left, color=grey, hatch=hatch, edgecolor="black", linewidth=0.5
            )
            left += widths
        axis.set_title(task, fontsize=9)
        axis.set(xlim=(0, 100), xlabel="% of the variance of G")
    axes[0, 0].set_yticks(range(len(rows)), [f"{site}, layer {layer}" for site, layer in rows], fontsize=8)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, fontsize=8)
    _title(figure, "which granularity the gate uses")
    return figure


def _joined(grids: np.ndarray) -> np.ndarray:
    """Put the grids of several images side by side, with an empty column between them."""
    gap = np.full((grids.shape[1], 1), np.nan)
    parts = [part for grid in grids for part in (grid, gap)][:-1]
    return np.concatenate(parts, axis=1)


def positions(result: Result, task: str, site: str) -> Figure:
    """Draw the mean of G at every position of the image grid, one panel per layer, each with a scale of its own."""
    layers = [layer for layer in result.layers(site, task) if (task, site, layer) in result.positions]
    tables = [_joined(result.positions[task, site, layer]) for layer in layers]
    columns = min(6, len(layers))
    rows = -(-len(layers) // columns)
    wide = tables[0].shape[1] / tables[0].shape[0]
    cell = min(1.5 * max(1.0, wide), 4.0)
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * (cell + 0.9), rows * 2.0 + 0.6), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(layers) :]:
        axis.axis("off")
    for axis, layer, table in zip(axes.flat, layers, tables, strict=False):
        image = axis.imshow(table, cmap=MAP, norm=_span([table]), aspect="equal" if table.shape[0] > 1 else "auto")
        axis.set_xticks([]), axis.set_yticks([])
        axis.set_title(f"layer {layer}", fontsize=8)
        bar = figure.colorbar(image, ax=axis, shrink=0.8)
        bar.ax.tick_params(labelsize=6)
    grid = "image grid" if tables[0].shape[0] > 1 else "frames of the clip"
    figure.supxlabel(f"position on the {grid}", fontsize=8)
    _title(
        figure, f"{task}, {site}: mean of G over {result.samples[task]:,} samples and all channels; a scale per layer"
    )
    return figure


def _picture(paths: Sequence[Path]) -> np.ndarray:
    """Return the images of a sample side by side, with a white gap; ``(SIDE, width, 3)``."""
    gap = np.full((SIDE, GAP, 3), 255, np.uint8)
    parts: list[np.ndarray] = []
    for path in paths:
        parts += [np.asarray(read_image(path).resize((SIDE, SIDE))), gap]
    return np.concatenate(parts[:-1], axis=1)


def _grey(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).convert("L"))


def overlays(result: Result, task: str, site: str, pictures: Mapping[str, Sequence[Path]]) -> Figure | None:
    """Draw G, averaged over the channels, over the images of the examples: a row per example, a column per layer.

    Args:
        result: Statistics with examples.
        task: Task of the examples.
        site: Site of the gates.
        pictures: Image files by question id.

    Returns:
        The figure; None if no example has its images, or the gates have no image positions.
    """
    layers = [layer for layer in result.layers(site, task) if (task, site, layer) in result.positions]
    shown = (
        [e for e in result.examples.get(task, ()) if e.id in pictures and (site, layers[0]) in e.maps] if layers else []
    )
    if not shown:
        return None
    images = len(pictures[shown[0].id])
    figure, axes = plt.subplots(
        len(shown),
        1 + len(layers),
        figsize=(1.45 * images * (1 + len(layers)) + 0.4, 1.85 * len(shown) + 0.7),
        squeeze=False,
        layout="constrained",
    )
    scales = {layer: _span([example.maps[site, layer] for example in shown]) for layer in layers}
    for row, example in zip(axes, shown, strict=True):
        _overlay_row(row, example, site, scales, _picture(pictures[example.id]), images)
    for axis, layer in zip(axes[0, 1:], layers, strict=True):
        scale = scales[layer]
        axis.set_title(f"layer {layer}\n{scale.vmin:.3f} (dark) to {scale.vmax:.3f}", fontsize=7)
    _title(figure, f"{task}, {site}: mean of G over the channels at each image position; a scale per layer")
    return figure


def _overlay_row(
    row: Sequence[Axes], example: Example, site: str, scales: Mapping[int, Any], picture: np.ndarray, images: int
) -> None:
    row[0].imshow(picture)
    text = "\n".join(textwrap.wrap(example.text or example.id, 26 * images)[:3])
    row[0].set_title(text, fontsize=7, loc="left")
    for axis, (layer, scale) in zip(row[1:], scales.items(), strict=True):
        axis.imshow(_grey(picture), cmap="gray", vmin=0, vmax=255)
        for number, grid in enumerate(as_grids(example.maps[site, layer], images)):
            left = number * (SIDE + GAP)
            where = (left - 0.5, left + SIDE - 0.5, SIDE - 0.5, -0.5)
            axis.imshow(grid, cmap=MAP, norm=scale, alpha=CLEAR, extent=where, interpolation="nearest")
        axis.set(xlim=(-0.5, picture.shape[1] - 0.5), ylim=(SIDE - 0.5, -0.5))
    for axis in row:
        axis.axis("off")
