"""The ``score`` command: score a prediction file against annotation files, without a model or a GPU."""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from data_modules.scoring.answers import matched, read_answers
from data_modules.scoring.scores import Options, Scores, score_task
from data_modules.scoring.truths import TRUTHS, read_json, read_truths
from vlpet_lightning.checksums import checksum
from vlpet_lightning.metrics.caption import DEFAULT, OPT_IN, SCORERS, check_caption_metrics
from vlpet_lightning.metrics.groups import as_percent
from vlpet_lightning.submissions import FORMATS
from vlpet_lightning.tasks import TASKS
from vlpet_lightning.version import __version__

PERCENT = 100.0
COLUMNS = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    found = argparse.ArgumentParser(
        prog="python -m vlpet_lightning score",
        description="Score a prediction file as the task's official scorer does. Accuracies are printed in percent, "
        "caption metrics times 100.",
        epilog="Prediction files: our own ({stage}_{task}.json), VQA, GQA and COCO result lists, NLVR2 csv, VALUE's "
        "JSON and JSON lines. Annotation files: the benchmark's processed files and the official ones. All may end in "
        ".gz.",
        allow_abbrev=False,
    )
    found.add_argument("--task", required=True, choices=tuple(TRUTHS), help="task")
    found.add_argument("--predictions", required=True, type=Path, metavar="FILE", help="predictions to score")
    found.add_argument(
        "--annotations",
        required=True,
        type=Path,
        nargs="+",
        metavar="FILE",
        help="annotation files; for VQA, a processed file beside the official one selects its questions",
    )
    found.add_argument("--split", default="test", help="split of a file with several splits (default: test)")
    found.add_argument("--partial", action="store_true", help="score the questions that have a prediction")
    found.add_argument(
        "--metrics",
        nargs="+",
        default=list(DEFAULT),
        metavar="NAME",
        help=f"caption metrics, of {', '.join(SCORERS)} (default: all but {', '.join(OPT_IN)})",
    )
    found.add_argument(
        "--caption_items",
        choices=("clip", "description"),
        default="clip",
        help="TVC, YC2C: score each clip once with all descriptions (VALUE's scorer), or each description as an item "
        "with itself as its only reference (the VL-PET repository)",
    )
    found.add_argument("--choices", type=Path, metavar="FILE", help="GQA's choices file, for validity and plausibility")
    found.add_argument("--json", action="store_true", help="print JSON")
    return found


def in_percent(scores: dict[str, float]) -> dict[str, float]:
    """Return scores times 100; GQA's distribution is no share and stays as it is."""
    return {name: value if name == "distribution" else PERCENT * value for name, value in scores.items()}


def report(task: str, found: Scores, questions: int, **more: Any) -> dict[str, Any]:
    """Return the result of a scoring as plain data."""
    return {
        "task": task,
        "questions": questions,
        "scores": in_percent(found.scores),
        "groups": {kind: as_percent(groups) for kind, groups in found.groups.items()},
        "notes": found.notes,
        **more,
    }


def _tables(result: dict[str, Any]) -> list[Table]:
    table = Table(title=f"{result['task']}: {result['questions']:,} questions", title_justify="left")
    table.add_column("metric")
    table.add_column("score", justify="right")
    table.add_column("scale")
    for name, value in result["scores"].items():
        scale = "x 100" if name == "cider" else "lower is better" if name == "distribution" else "percent"
        table.add_row(name, f"{value:.2f}", scale, style="bold" if name == TASKS[result["task"]].score else None)
    tables = [table]
    for kind, groups in result["groups"].items():
        table = Table(title=f"accuracy by {kind}", title_justify="left")
        table.add_column(kind)
        table.add_column("percent", justify="right")
        table.add_column("questions", justify="right")
        for name, group in groups.items():
            table.add_row(name, f"{group['score']:.2f}", f"{group['questions']:,}")
        tables.append(table)
    return tables


def _rounds(task: str, metrics: Sequence[str]) -> int:
    return len(metrics) if TASKS[task].score == "cider" else 1


def score(args: Sequence[str]) -> None:
    """Score a prediction file.

    Args:
        args: The command's options; see ``--help``.

    Raises:
        FileNotFoundError: If a file does not exist.
        AnnotationError: If an annotation file cannot be used.
        PredictionError, SubmissionError: If the prediction file cannot be read.
        ScoringError: If ids are missing, unknown or repeated.
    """
    known = parser().parse_args(args)
    check_caption_metrics(known.metrics)
    with without_collection():
        _score(known)


@contextmanager
def without_collection() -> Iterator[None]:
    """Pause garbage collection, which would scan millions of decoded objects again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _score(known: argparse.Namespace) -> None:
    console = Console()
    quiet = Console(stderr=True)
    hashing = ThreadPoolExecutor(1)  # hashing leaves the interpreter to the decoder
    sums = {path: hashing.submit(checksum, path) for path in (*known.annotations, known.predictions) if path.is_file()}
    hashing.shutdown(wait=False)
    truths = read_truths(known.task, known.annotations, known.split)
    answers = read_answers(known.task, known.predictions, truths)
    predictions, left_out = matched(
        answers.pairs, truths.references, partial=known.partial, source=str(known.predictions)
    )
    options = Options(known.metrics, known.caption_items, None if known.choices is None else read_json(known.choices))
    with Progress(*COLUMNS, console=quiet, transient=True) as progress:
        bar = progress.add_task("scoring", total=len(predictions) * _rounds(known.task, known.metrics))
        found = score_task(
            known.task, predictions, truths.references, options, lambda count: progress.advance(bar, count)
        )
    result = report(
        known.task,
        found,
        len(predictions),
        partial=left_out,
        protocol={
            "run": answers.protocol,
            "scale": "accuracies in percent, caption metrics x 100",
            **({"caption_items": known.caption_items} if FORMATS[known.task].key == "clip" else {}),
            "annotations": {path.name: sums[path].result() for path in known.annotations},
            "predictions": {known.predictions.name: sums[known.predictions].result()},
            "version": __version__,
        },
    )
    if known.json:
        print(json.dumps(result, indent=2))  # noqa: T201  # machine-readable, unlike a console's output
        return
    for table in _tables(result):
        console.print(table)
    for line in left_out:
        console.print(f"partial: {line}", style="yellow", soft_wrap=True, highlight=False)
    for note in found.notes:
        console.print(note, style="dim", soft_wrap=True, highlight=False)
