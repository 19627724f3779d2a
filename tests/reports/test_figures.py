"""Figures: what is drawn, files in both formats, and none without data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from tests.reports.run_folders import all_scores, make_record, write_run
from vlpet_lightning.reports.comparison import Comparison
from vlpet_lightning.reports.figures import chosen, curves, front, gains, pareto, profile, write_figures
from vlpet_lightning.reports.groups import group_runs
from vlpet_lightning.reports.runs import find_runs


def comparison(folder: Path, count: int = 3, losses: int = 30, seeds: int = 1) -> Comparison:
    names = []
    for number in range(count):
        for seed in range(seeds):
            record = make_record(seed=seed, percent=100.0 if number == 0 else 2.0 * number)
            path = folder / f"{number:02d}_{seed}"
            write_run(path, all_scores(60.0 + number + seed), record, placements=[{"rank": number}], losses=losses)
            names.append(f"m{number}")
    return Comparison(group_runs(find_runs([folder])[0], names))


def test_figures_are_written_as_png_and_svg_and_are_reproducible(tmp_path: Path) -> None:
    found = comparison(tmp_path / "runs", seeds=2)
    written = {}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        written[name] = write_figures(found, tmp_path / name)
    assert sorted(path.name for path in written["one"]) == sorted(
        f"{stem}.{kind}" for stem in ("pareto", "gain", "curves", "profile") for kind in ("png", "svg")
    )
    assert [a.read_bytes() == b.read_bytes() for a, b in zip(*written.values(), strict=True)] == [True] * 8
    for path in written["one"]:
        if path.suffix == ".png":
            colours = Image.open(path).convert("RGB").getcolors(1 << 20)
            assert colours is not None
            assert len(colours) > 20


def test_the_pareto_front_has_no_point_that_another_beats() -> None:
    rng = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in rng.integers(0, 12, size=(60, 2))]
    line = front(points)
    beaten = [p for p in points if any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)]
    assert set(line) == set(points) - set(beaten)
    assert line == sorted(line)


def test_the_front_and_the_gain_are_those_of_the_comparable_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = comparison(tmp_path / "runs")
    blind = make_record(inputs={"shuffle_features": True}, percent=1.0)
    write_run(tmp_path / "runs/zz", all_scores(99.0), blind, placements=[{"rank": 9}])
    runs = find_runs([tmp_path / "runs"])[0]
    found = Comparison(group_runs(runs, ["full", "m1", "m2", "blind"]))
    steps: list[list[float]] = []
    bars: list[list[float]] = []
    monkeypatch.setattr(Axes, "step", lambda axis, x, y, **style: steps.append([*x, *y]))
    monkeypatch.setattr(Axes, "barh", lambda axis, places, widths, **style: bars.append(list(widths)))
    pareto(found, tmp_path / "pareto")
    assert steps == [[2.0, 4.0, 72.75, 73.0]]
    gains(found, tmp_path / "gain")
    assert bars[0] == pytest.approx([100 * 0.25 / 72.5, 100 * 0.5 / 72.5])


def test_without_full_fine_tuning_or_losses_there_is_no_figure_of_them(tmp_path: Path) -> None:
    write_run(tmp_path / "a", all_scores(60), make_record())
    found = Comparison(group_runs(find_runs([tmp_path])[0]))
    assert gains(found, tmp_path / "gain") == []
    assert curves(found.groups, tmp_path / "curves") == []
    assert profile(found, tmp_path / "profile") == []
    assert pareto(found, tmp_path / "pareto") == []
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("logged", [2, 8, 14, 60])
def test_a_curve_of_few_logged_losses_is_still_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: int
) -> None:
    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda axis, x, y, **style: drawn.append(len(y)))
    found = comparison(tmp_path / "runs", count=1, losses=logged)
    curves(found.groups, tmp_path / "a")
    assert drawn[0] > logged // 2


def test_seeds_are_a_mean_with_a_band(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bands = []
    monkeypatch.setattr(Axes, "fill_between", lambda axis, x, low, high, **style: bands.append((low, high)))
    found = comparison(tmp_path / "runs", count=1, seeds=3)
    curves(found.groups, tmp_path / "a")
    assert len(bands) == 2  # of loss and score
    assert all((low <= high).all() for low, high in bands)


def test_of_many_groups_the_curves_show_the_baseline_and_evenly_spaced_others(tmp_path: Path) -> None:
    found = comparison(tmp_path / "runs", count=12)
    shown = [group.label for group in chosen(found)]
    assert len(shown) == 8
    assert shown[:2] == ["m0", "m11"]
    assert shown[-1] == "m1"
