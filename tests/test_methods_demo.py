"""The committed report of the methods at demo size is consistent in itself and with the sweep."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

import yaml

from vlpet_lightning.tasks import IMAGE_TEXT, TASKS

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / "experiments/methods_demo"


def rows(name: str) -> list[dict[str, str]]:
    with (FOLDER / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_is_that_of_the_runs() -> None:
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows("runs.csv"):
        if row["metric"] == TASKS[row["task"]].score:
            scores[row["method"]][row["task"]].append(float(row["score"]))
    measured = [row for row in rows("table.csv") if row["kind"] == "measured"]
    sweep = yaml.safe_load((REPOSITORY / "experiments/sweeps/methods.yaml").read_text())["parameters"]
    assert len(measured) == len(scores) == len(sweep["overlays"]["values"])
    lines = (FOLDER / "README.md").read_text().splitlines()
    for row in measured:
        each = scores[row["method"]]
        assert all(len(some) == len(sweep["seed_everything"]["values"]) for some in each.values())
        line = next(line for line in lines if line.startswith((f"| {row['method']} |", f"| {row['method']} <sup>")))
        for task in IMAGE_TEXT:
            assert float(row[f"{task}_mean"]) == fmean(each[task])
            assert f"{fmean(each[task]):.2f} ({stdev(each[task]):.2f})" in line
        averages = [fmean(parts) for parts in zip(*(each[task] for task in IMAGE_TEXT), strict=True)]
        assert f"{fmean(averages):.2f} ({stdev(averages):.2f})" in line


def test_it_is_small_and_names_no_machine() -> None:
    files = [path for path in FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_000_000
    texts = [path.read_text() for path in files if path.suffix in (".md", ".csv", ".tex")]
    assert not any(place in text for text in texts for place in ("/work", "/home", "/tmp"))
