"""Figures of a comparison, for screen and print: PNG and SVG, colours of Okabe and Ito that survive colour blindness.

Groups also differ in marker and line style, so that the figures can be read in grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # works without a display
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlpet_lightning.reports.comparison import AVERAGE, Comparison, title, unit
from vlpet_lightning.reports.groups import Group, Value
from vlpet_lightning.tasks import TASKS

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "os^Dv<>PX*"
DASHES = ("-", "--", ":", "-.")
MOST_CURVES = 8
POINTS = 120  # of a curve, at most
WINDOW = 15  # logged losses over which a curve is averaged, at most a fifth of them
STYLE: dict[Any, Any] = {"svg.hashsalt": "vlpet_lightning", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
Series = tuple[np.ndarray, np.ndarray]  # steps, values


def save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and SVG, without the date, so that equal figures are equal files."""
    paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
    figure.savefig(paths[0], dpi=130, metadata={"Software": None})
    figure.savefig(paths[1], metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return paths


def write_figures(comparison: Comparison, folder: Path) -> list[Path]:
    """Write all figures for which the runs have data.

    Returns:
        The written files.
    """
    with plt.rc_context(STYLE):
        return [
            *pareto(comparison, folder / "pareto"),
            *gains(comparison, folder / "gain"),
            *curves(chosen(comparison), folder / "curves"),
            *profile(comparison, folder / "profile"),
        ]


# score against trained parameters ------------------------------------------------------------------------------------


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the Pareto-optimal points: no other has fewer parameters and at least their score, or as many and more.

    Args:
        points: Trained parameters and score.

    >>> front([(1.0, 5.0), (2.0, 4.0), (3.0, 6.0), (3.0, 5.5)])
    [(1.0, 5.0), (3.0, 6.0)]
    """
    found: list[tuple[float, float]] = []
    for parameters, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or score > found[-1][1]:
            found.append((parameters, score))
    return found


def pareto(comparison: Comparison, path: Path) -> list[Path]:
    """Plot the average score of the comparable groups against the trained parameters, with their Pareto front."""
    known = [
        (group.percent, value, group)
        for group in comparison.comparable
        if (value := comparison.values(group)[-1]) is not None and group.percent
    ]
    if len(known) < 2:
        return []
    figure, axis = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    for number, (percent, value, group) in enumerate(known):
        axis.errorbar(
            percent, value.mean, yerr=value.std, color=COLOURS[number % len(COLOURS)], capsize=2, linestyle="none",
            marker=MARKERS[number % len(MARKERS)], label=group.label,
        )  # fmt: skip
    line = front([(percent, value.mean) for percent, value, _ in known])
    axis.step(*zip(*line, strict=True), where="post", color="0.4", linewidth=1, zorder=0, label="Pareto front")
    axis.set_xscale("log")
    axis.set(xlabel="trained parameters (% of all, log scale)", ylabel=_average_label(comparison))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    return save(figure, path)


def _average_label(comparison: Comparison) -> str:
    return f"average of {', '.join(title(task) for task in comparison.tasks)}\n(percent; CIDEr x 100)"


def _label(comparison: Comparison, group: Group) -> str:
    return group.label if group in comparison.comparable else f"{group.label} (not comparable)"


# relative gain -------------------------------------------------------------------------------------------------------


def full_fine_tuning(groups: Sequence[Group]) -> Group | None:
    """Return the group that trains all parameters, if there is one."""
    return next((group for group in groups if group.percent == 100), None)


def relative_gain(value: Value, full: Value) -> float:
    """Return the gain of an average over that of full fine-tuning in percent (paper, figure 1).

    >>> round(relative_gain(Value(79.18, None), Value(77.33, None)), 2)
    2.39
    """
    return 100 * (value.mean - full.mean) / full.mean


def gains(comparison: Comparison, path: Path) -> list[Path]:
    """Plot the relative gain of the average over full fine-tuning, with the published gain beside it."""
    full = full_fine_tuning(comparison.comparable)
    whole = None if full is None else comparison.values(full)[-1]
    if full is None or whole is None:
        return []
    known = [
        (relative_gain(value, whole), value, group)
        for group in comparison.comparable
        if group is not full and (value := comparison.values(group)[-1]) is not None
    ]
    if not known:
        return []
    known.sort(key=lambda entry: entry[0])
    figure, axis = plt.subplots(figsize=(6.4, 1.2 + 0.32 * len(known)), layout="constrained")
    several = any(value.std is not None for _, value, _ in known)
    spread = [100 * (value.std or 0) / whole.mean for _, value, _ in known] if several else None
    places = np.arange(len(known))
    axis.barh(
        places, [gain for gain, _, _ in known], xerr=spread, color="#56B4E9", ecolor="0.3", capsize=2, label="measured"
    )
    published = [_published_gain(group, full) for _, _, group in known]
    there = [(gain, place) for gain, place in zip(published, places, strict=True) if gain is not None]
    if there:
        axis.plot(*zip(*there, strict=True), "D", color="#D55E00", markersize=4, label="published, not measured here")
        axis.legend(fontsize=7)
    axis.set_yticks(places, [group.label for _, _, group in known])
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlabel=f"gain of the average over {full.label} (% of it{', bars: std over seeds' if several else ''})")
    return save(figure, path)


def _published_gain(group: Group, full: Group) -> float | None:
    """Return the published gain of a method over full fine-tuning in the same source's terms; None if unknown."""
    for row in group.same_method:
        for base in full.same_method:
            if (base.backbone, base.key.partition("/")[2]) == (row.backbone, row.key.partition("/")[2]):
                return relative_gain(Value(*row.average), Value(*base.average))
    return None


# learning curves -----------------------------------------------------------------------------------------------------


def chosen(comparison: Comparison) -> list[Group]:
    """Return the groups whose curves are drawn: the baseline, and the others evenly spaced by their average."""
    if len(comparison.groups) <= MOST_CURVES:
        return list(comparison.groups)
    ranked = sorted(
        (group for group in comparison.groups if group is not comparison.reference),
        key=lambda group: -value.mean if (value := comparison.values(group)[-1]) is not None else float("inf"),
    )
    places = np.linspace(0, len(ranked) - 1, MOST_CURVES - 1).round().astype(int)
    return [comparison.reference, *(ranked[place] for place in places)]


def _series(rows: Sequence[dict[str, float]], name: str) -> Series:
    by_step = {row["step"]: row[name] for row in rows if name in row and "step" in row}  # a repeated step counts once
    return np.array(list(by_step)), np.array(list(by_step.values()))


def _smooth(series: Series) -> Series:
    steps, values = series
    if not len(values):
        return series
    window = min(WINDOW, max(1, len(values) // 5))
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    kept = np.unique(np.linspace(0, len(smooth) - 1, POINTS).round().astype(int))
    return steps[len(steps) - len(smooth) :][kept], smooth[kept]


def _plot(axis: Axes, each: Sequence[Series], colour: str, dash: str, marker: str, label: str) -> None:
    """Plot the mean of the runs, with a band from the lowest to the highest; runs that differ in steps one by one."""
    each = [series for series in each if len(series[0])]
    style: dict[str, Any] = {"color": colour, "linestyle": dash, "marker": marker, "markersize": 3, "linewidth": 1.2}
    if len(each) > 1 and all(np.array_equal(series[0], each[0][0]) for series in each):
        values = np.stack([series[1] for series in each])
        axis.plot(each[0][0], values.mean(axis=0), label=label, **style)
        axis.fill_between(each[0][0], values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        return
    for number, series in enumerate(each):
        axis.plot(*series, label=label if number == 0 else None, **style)


def curves(shown: Sequence[Group], path: Path) -> list[Path]:
    """Plot the training loss (top) and validation score (bottom) of every task.

    Args:
        shown: Groups whose curves are drawn.
        path: File to write, without suffix.

    Returns:
        The written files; none if the runs have no loss.
    """
    rows = [row for group in shown for run in group.runs for row in run.rows]
    tasks = [name for name in TASKS if any(f"train/{name}/loss" in row for row in rows)]
    if not tasks:
        return []
    figure, axes = plt.subplots(2, len(tasks), figsize=(3.2 * len(tasks) + 1, 5.2), squeeze=False, layout="constrained")
    for column, task in enumerate(tasks):
        score = f"val/{task}/{TASKS[task].score}"
        for group in shown:
            number = list(shown).index(group)
            style = (COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)])
            losses = [_smooth(_series(run.rows, f"train/{task}/loss")) for run in group.runs]
            scores = [_series(run.rows, score) for run in group.runs]
            _plot(axes[0, column], losses, *style, "", group.label)
            _plot(axes[1, column], scores, *style, MARKERS[number % len(MARKERS)], group.label)
        axes[0, column].set(title=title(task), xlabel="optimiser step")
        axes[1, column].set(xlabel="optimiser step", ylabel="validation\n" + unit(task).replace(" in ", "\nin "))
    axes[0, 0].set(ylabel="training loss")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return save(figure, path)


# task profile --------------------------------------------------------------------------------------------------------


def profile(comparison: Comparison, path: Path) -> list[Path]:
    """Plot a table of the scores of all groups and tasks, coloured by the gain over the baseline in percent."""
    if len(comparison.groups) < 2:
        return []
    base = comparison.values(comparison.reference)
    columns = [n for n, value in enumerate(base) if value is not None and value.mean]
    if not columns:
        return []
    groups = [group for group in comparison.groups if any(comparison.values(group)[n] is not None for n in columns)]
    gain = np.full((len(groups), len(columns)), np.nan)
    texts: dict[tuple[int, int], str] = {}
    for i, group in enumerate(groups):
        for j, n in enumerate(columns):
            value, there = comparison.values(group)[n], base[n]
            if value is not None and there is not None:
                gain[i, j] = relative_gain(value, there)
                texts[i, j] = f"{value.mean:.1f}"
    scale = [i for i, group in enumerate(groups) if group in comparison.comparable] or list(range(len(groups)))
    most = float(np.nanmax(np.abs(gain[scale]))) or 1.0  # a control would leave the others without colour
    figure, axis = plt.subplots(figsize=(2.6 + 1.15 * len(columns), 1.3 + 0.3 * len(groups)), layout="constrained")
    image = axis.imshow(gain, cmap="PuOr", vmin=-most, vmax=most, aspect="auto")
    for (i, j), text in texts.items():
        axis.text(
            j, i, text, ha="center", va="center", fontsize=8, color="white" if abs(gain[i, j]) > 0.7 * most else "black"
        )
    names = [*comparison.tasks, AVERAGE]
    axis.set_xticks(range(len(columns)), [title(names[n]) for n in columns])
    axis.set_yticks(range(len(groups)), [_label(comparison, group) for group in groups])
    axis.grid(visible=False)
    axis.set(xlabel="test score (percent; CIDEr x 100)")
    figure.colorbar(image, ax=axis, label=f"gain over {comparison.reference.label} (%)")
    return save(figure, path)
