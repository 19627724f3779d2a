"""Questions of one or two runs, merged by task and id, with predictions and scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlpet_lightning.metrics.questions import caption_question_scores, question_score, truth
from vlpet_lightning.prediction_files import Record, read_predictions
from vlpet_lightning.tasks import TASKS

TRUTHS = 5  # shown per question
TYPES = ("answer_type", "question_type")
MOST_CIDER = 10.0  # of a single caption
STAGES = {"val": "validate"}  # command that writes the predictions of a split, if it is not named like the split


class BrowseError(ValueError):
    """Runs that cannot be browsed; names the run and the cure."""


@dataclass
class Entry:
    """One question.

    Args:
        task: Name of its task.
        id: Question id.
        said: Prediction of each run; None if a run lacks the question.
        scores: Score of each prediction: from 0 to 1, for captions CIDEr; None if unknown.
        text: Question without the prompt.
        images: Image ids.
        types: ``answer_type`` and ``question_type``, if the reference has them.
        truth: True answers, best first.
    """

    task: str
    id: str
    said: list[str | None]
    scores: list[float | None]
    text: str = ""
    images: list[str] = field(default_factory=list)
    types: dict[str, str] = field(default_factory=dict)
    truth: list[str] = field(default_factory=list)

    def add(self, number: int, record: Record, score: float | None) -> None:
        """Add the prediction of a run; a run without references gets those of the other."""
        reference = record.get("reference") or {}
        self.said[number], self.scores[number] = str(record["prediction"]), score
        self.text = self.text or str(record.get("text") or "")
        self.images = self.images or [str(image) for image in record.get("images") or []]
        self.types = self.types or {name: str(reference[name]) for name in TYPES if reference.get(name)}
        self.truth = self.truth or truth(reference)[:TRUTHS]

    @property
    def difference(self) -> float:
        """How much the scores of two runs differ, from 0 to 1; 0 for a single run or unknown scores."""
        known = [score for score in self.scores if score is not None]
        return abs(known[0] - known[1]) / largest_score(self.task) if len(known) == 2 else 0.0


def largest_score(task: str) -> float:
    """Return the largest score that a question of a task can have."""
    return MOST_CIDER if TASKS[task].score == "cider" else 1.0


def prediction_files(run: Path, split: str) -> dict[str, Path]:
    """Return the prediction files of a run by task.

    Raises:
        BrowseError: If there is none.
    """
    if not run.is_dir():
        raise BrowseError(f"there is no folder {run}: give the folder of a run, which has a folder predictions")
    folder = run / "predictions"
    found = {task: folder / f"{split}_{task}.json" for task in TASKS}
    found = {task: path for task, path in found.items() if path.is_file()}
    if found:
        return found
    others = [
        other for other in ("test", "val", "predict") if any((folder / f"{other}_{t}.json").is_file() for t in TASKS)
    ]
    cure = f"choose --split {' or '.join(others)}, or run" if others else "run"
    raise BrowseError(
        f"no {split} predictions in {folder}: {cure} `python -m vlpet_lightning {STAGES.get(split, split)}` with the "
        "callback PredictionWriter first"
    )


def _scores(task: str, records: Sequence[Record]) -> tuple[list[float | None], str]:
    """Return the score of every record, and a note if captions could not be scored."""
    references = [record.get("reference") or {} for record in records]
    predictions = [str(record["prediction"]) for record in records]
    if TASKS[task].score != "cider":
        return [question_score(*pair) for pair in zip(predictions, references, strict=True)], ""
    try:
        scores = caption_question_scores(predictions, references)
    except RuntimeError as error:  # no Java: the captions can still be read
        return [None] * len(records), f"{task} without scores: {error}"
    if any(references) and all(score is None for score in scores):
        return scores, f"{task} without scores: CIDEr is 0 for any caption with the references of so few images"
    return scores, ""


def read_entries(
    runs: Sequence[Path],
    split: str,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Entry], list[dict[str, Any]], list[str]]:
    """Read the questions of one or two runs.

    Args:
        runs: Run folders.
        split: ``test``, ``val`` or ``predict``.
        advance: Called after each file with the number of files read and of all files, for a progress bar.

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
            f"the runs have no task in common: {runs[0]} has {', '.join(files[0])}, and {runs[-1]} has "
            f"{', '.join(files[-1])}"
        )
    entries: dict[tuple[str, str], Entry] = {}
    protocols: list[dict[str, Any]] = [{} for _ in runs]
    notes: dict[str, None] = {}  # without repetitions, in order
    for run, some in zip(runs, files, strict=True):
        if left := [task for task in some if task not in tasks]:
            notes[f"left out, as only {run} has it: {', '.join(left)}"] = None
    for at, task in enumerate(tasks):
        for number, some in enumerate(files):
            predictions = read_predictions(some[task])
            # strings for NaN and Infinity, which JavaScript cannot parse
            protocols[number] = protocols[number] or json.loads(json.dumps(predictions.protocol), parse_constant=str)
            scores, note = _scores(task, predictions.records)
            notes |= {note: None} if note else {}
            for record, score in zip(predictions.records, scores, strict=True):
                id = str(record["question_id"])
                entry = entries.setdefault((task, id), Entry(task, id, [None] * len(runs), [None] * len(runs)))
                entry.add(number, record, score)
            advance(at * len(files) + number + 1, len(tasks) * len(files))
    for number, run in enumerate(runs):
        if alone := sum(entry.said[number] is None for entry in entries.values()):
            notes[f"{alone:,} of {len(entries):,} questions have no prediction in {run}"] = None
    order = {task: place for place, task in enumerate(tasks)}
    found = sorted(entries.values(), key=lambda entry: (-entry.difference, order[entry.task], entry.id))
    return found, protocols, list(notes)
