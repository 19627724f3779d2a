"""The ``report`` command: test scores of finished runs as a table, learning curves and a contact sheet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vlpet_lightning.atomic_file import check_folder
from vlpet_lightning.commands import protocols
from vlpet_lightning.commands.figures import contact_sheet, curves
from vlpet_lightning.loggers import read_metrics
from vlpet_lightning.prediction_files import read_predictions
from vlpet_lightning.protocol import scale_of
from vlpet_lightning.tasks import TASKS

Scores = dict[str, dict[str, float]]  # "vqa" -> {"accuracy": ...}
HEAD = ("task", "split", "metric", "scale")


def read_scores(run: Path) -> Scores:
    """Return the last test scores of a run, by task.

    Raises:
        FileNotFoundError: If the run has no test scores.
    """
    found: Scores = {}
    for row in read_metrics(run):
        for name, value in row.items():
            stage, _, rest = name.partition("/")
            task, _, metric = rest.partition("/")
            if stage == "test" and metric:
                found.setdefault(task, {})[metric] = value
    if not found:
        raise FileNotFoundError(
            f"no test scores in {run / 'metrics.csv'}: run `python -m vlpet_lightning test --config {run}/config.yaml "
            f"--ckpt_path {run}/checkpoints/last.ckpt` first"
        )
    return found


def rows(scores: dict[str, Scores]) -> list[tuple[str, str, list[float | None]]]:
    """Return rows of task, metric and each run's value: a task's main score first, the average last."""
    table: list[tuple[str, str, list[float | None]]] = []
    mains: list[list[float | None]] = []
    for name, spec in TASKS.items():
        metrics = sorted(
            {metric for run in scores.values() for metric in run.get(name, {})}, key=lambda m: (m != spec.score, m)
        )
        if metrics:  # a run without the main score of one of its tasks has no average
            mains.append([run.get(name, {}).get(spec.score) for run in scores.values()])
        for metric in metrics:
            values = [run.get(name, {}).get(metric) for run in scores.values()]
            table.append((name, metric, values))
    columns = list(zip(*mains, strict=True))
    average = [None if None in column else sum(column) / len(column) for column in columns]
    table.append(("average", "", list(average)))
    return table


def _cells(values: Sequence[float | None]) -> list[str]:
    return ["" if value is None else f"{value:.2f}" for value in values]


def _named_rows(scores: dict[str, Scores], records: protocols.Records) -> list[list[str]]:
    """Return the cells of the table: task, split, metric, scale and each run's value."""
    return [
        [
            task,
            protocols.splits_of(records, task) if metric else "",
            metric,
            scale_of(metric) if metric else "",
            *_cells(values),
        ]
        for task, metric, values in rows(scores)
    ]


def as_markdown(scores: dict[str, Scores], records: protocols.Records | None = None) -> str:
    """Return the scores as a Markdown table, with split and scale of each.

    Args:
        scores: Scores by run.
        records: Protocol records by run, which know the part of a split that was scored.
    """
    head = [*HEAD, *scores]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(HEAD) + "---:|" * len(scores)]
    lines += ["| " + " | ".join(cells) + " |" for cells in _named_rows(scores, records or {})]
    return "\n".join(lines) + "\n"


def as_table(scores: dict[str, Scores], records: protocols.Records) -> Table:
    """Return the scores as a table for the terminal."""
    table = Table(title="test scores")
    for name in HEAD:
        table.add_column(name)
    for name in scores:
        table.add_column(name, justify="right")
    for cells in _named_rows(scores, records):
        task, metric = cells[0], cells[2]
        if task == "average":
            table.add_section()
        table.add_row(*cells, style="bold" if metric in ("", _main(task)) else None)
    return table


def _main(task: str) -> str:
    return TASKS[task].score if task in TASKS else ""


def _predictions(run: Path) -> dict[str, list[dict[str, Any]]]:
    files = {name: run / "predictions" / f"test_{name}.json" for name in TASKS}
    return {name: read_predictions(path).records for name, path in files.items() if path.is_file()}


def report(runs: list[Path] | Path, out: Path, names: list[str] | None = None, images: Path | None = None) -> None:
    """Write a table of test scores with the protocol of each, learning curves and a contact sheet of finished runs.

    The report names every item in which the protocols of the runs differ (:mod:`vlpet_lightning.protocol`), and the
    published rows of their methods, apart from the measured scores.

    Args:
        runs: Run folder or folders, each with the metrics.csv of its fit and test.
        out: Folder for report.md, scores.json, curves.png (if the runs have a fit) and contact_sheet.png.
        names: Names of the runs in the tables; by default the names of their folders.
        images: Folder with the test images, as <store>/<image id>.png; without it there is no contact sheet.

    Raises:
        FileExistsError: If ``out`` is a file.
        FileNotFoundError: If a run was not tested.
        ValueError: If the names are not as many as the runs, or not distinct.
    """
    runs = [runs] if isinstance(runs, Path) else runs
    names = names or [run.name for run in runs]
    if len(names) != len(runs) or len(set(names)) != len(names):
        raise ValueError(f"{len(runs)} runs need as many different names, got {names}")
    scores = {name: read_scores(run) for name, run in zip(names, runs, strict=True)}
    records = protocols.test_records(dict(zip(names, runs, strict=True)))
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(as_markdown(scores, records) + protocols.as_markdown(records))
    content = {"scores": scores, **protocols.as_json(records)}
    (out / "scores.json").write_text(json.dumps(content, indent=2) + "\n")
    written = ["report.md", "scores.json"]
    if curves({name: read_metrics(run) for name, run in zip(names, runs, strict=True)}, out / "curves.png"):
        written.append("curves.png")
    if images is not None:
        contact_sheet(_predictions(runs[0]), images, out / "contact_sheet.png", title=names[0])
        written.append("contact_sheet.png")
    console = Console()
    console.print(as_table(scores, records))
    for part in protocols.as_tables(records):
        console.print(part)
    console.print("written: " + ", ".join(str(out / name) for name in written), soft_wrap=True)
