"""Questions of one or two runs, merged by task and id, with predictions and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlpet_lightning.metrics.questions import caption_question_scores, question_score, truth
from vlpet_lightning.prediction_files import Predictions, read_predictions
from vlpet_lightning.tasks import TASKS

TRUTHS = 5  # shown per question
KINDS = ("answer_type", "question_type")
MOST_CIDER = 10.0  # of a single caption


class BrowseError(ValueError):
    """Runs that cannot be browsed; names the run and the cure."""


@dataclass
class Entry:
    """One question.

    Args:
        task: Name of its task.
        id: Question id.
        text: Question without the prompt.
        images: Image ids.
        kind: Question type; empty if the reference has none.
        truth: True answers, best first.
        said: Prediction of each run; None if a run lacks the question.
        scores: Score of each prediction: from 0 to 1, for captions CIDEr; None if unknown.
    """

    task: str
    id: str
    text: str
    images: list[str]
    kind: str
    truth: list[str]
    said: list[str | None]
    scores: list[float | None] = field(default_factory=list)

    @property
    def difference(self) -> float:
        """How much the scores of two runs differ, from 0 to 1; 0 for a single run or unknown scores."""
        known = [score for score in self.scores if score is not None]
        largest = MOST_CIDER if TASKS[self.task].score == "cider" else 1.0
        return abs(known[0] - known[1]) / largest if len(known) == 2 else 0.0


def prediction_files(run: Path, split: str) -> dict[str, Path]:
    """Return the prediction files of a run by task.

    Raises:
        BrowseError: If there is none.
    """
    folder = run / "predictions"
    found = {task: folder / f"{split}_{task}.json" for task in TASKS}
    found = {task: path for task, path in found.items() if path.is_file()}
    if not found:
        raise BrowseError(
            f"no {split} predictions in {folder}: run `python -m vlpet_lightning "
            f"{'validate' if split == 'val' else split}` with the callback PredictionWriter first"
        )
    return found


def _scores(predictions: Predictions) -> tuple[list[float | None], str]:
    """Return the score of every record, and a note if captions could not be scored."""
    records = predictions.records
    if any((record.get("reference") or {}).get("captions") for record in records):
        captioned = [record for record in records if record["reference"]]
        try:
            found = caption_question_scores(
                [record["prediction"] for record in captioned], [record["reference"] for record in captioned]
            )
        except RuntimeError as error:  # no Java: the captions can still be read
            return [None] * len(records), str(error)
        by_id = dict(zip((record["question_id"] for record in captioned), found, strict=True))
        return [by_id.get(record["question_id"]) for record in records], ""
    return [question_score(record["prediction"], record.get("reference")) for record in records], ""


def _kind(reference: dict[str, Any] | None) -> str:
    return next((str(reference[name]) for name in KINDS if reference and reference.get(name)), "")


def read_entries(runs: Sequence[Path], split: str) -> tuple[list[Entry], list[dict[str, Any]], list[str]]:
    """Read the questions of one or two runs.

    Args:
        runs: Run folders.
        split: ``test``, ``val`` or ``predict``.

    Returns:
        The questions, by largest difference between the runs, then by task and id; the protocol of each run; notes.

    Raises:
        BrowseError: If a run has no predictions, or two runs have no task in common.
        PredictionError: If a file is damaged.
    """
    files = [prediction_files(run, split) for run in runs]
    tasks = [task for task in files[0] if all(task in some for some in files)]
    if not tasks:
        raise BrowseError(
            f"the runs have no task in common: {runs[0]} has {', '.join(files[0])}, and {runs[-1]} "
            f"{', '.join(files[-1])}"
        )
    entries: dict[tuple[str, str], Entry] = {}
    protocols: list[dict[str, Any]] = [{} for _ in runs]
    notes: list[str] = []
    for task in tasks:
        for number, some in enumerate(files):
            predictions = read_predictions(some[task])
            protocols[number] = protocols[number] or predictions.protocol
            scores, note = _scores(predictions)
            notes += [f"{task}: {note}"] if note and number == 0 else []
            for record, score in zip(predictions.records, scores, strict=True):
                key = task, str(record["question_id"])
                if key not in entries:
                    entries[key] = _entry(task, record, len(runs))
                entries[key].said[number], entries[key].scores[number] = str(record["prediction"]), score
    order = {task: place for place, task in enumerate(tasks)}
    found = sorted(entries.values(), key=lambda entry: (-entry.difference, order[entry.task], entry.id))
    return found, protocols, notes


def _entry(task: str, record: dict[str, Any], runs: int) -> Entry:
    reference = record.get("reference")
    return Entry(
        task,
        str(record["question_id"]),
        str(record.get("text") or ""),
        [str(image) for image in record.get("images") or []],
        _kind(reference),
        truth(reference)[:TRUTHS],
        [None] * runs,
        [None] * runs,
    )
