"""Score of each test question in several runs, on the scale of the task's main score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlpet_lightning.metrics.questions import caption_question_scores_of, question_score
from vlpet_lightning.metrics.vqa import vqa_accuracy_original
from vlpet_lightning.prediction_files import Record, read_predictions
from vlpet_lightning.reports.runs import Run
from vlpet_lightning.tasks import TASKS

TOLERANCE = 0.01  # points by which the mean of the questions may differ from the logged score


@dataclass(frozen=True)
class Questions:
    """Scores of the same questions in several runs.

    Args:
        task: The task.
        ids: ``Q`` question ids, sorted.
        scores: ``(runs, Q)`` float64 scores, times 100; their mean is the run's main score.
    """

    task: str
    ids: tuple[str, ...]
    scores: np.ndarray


def _score(task: str, prediction: str, reference: Mapping[str, Any] | None) -> float | None:
    if TASKS[task].score == "accuracy_original" and reference and reference.get("answers"):
        return vqa_accuracy_original(prediction, reference["answers"])
    return question_score(prediction, reference)


def read_questions(
    runs: Sequence[Run], task: str, advance: Callable[[], None] = lambda: None
) -> tuple[Questions | None, str]:
    """Read the score of each test question of a task.

    Args:
        runs: Runs with a score of the task.
        task: The task.
        advance: Called after each run, for a progress bar.

    Returns:
        The scores and an empty text; or None and the reason: a run has no prediction file, its predictions are of
        other questions than the first run's, have no public answers, or do not have the logged score.
    """
    files = [run.prediction_file(task) for run in runs]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        return None, f"there is no {missing}"
    captions = TASKS[task].score == "cider"
    ids: tuple[str, ...] = ()
    rows: list[list[float | None]] = []
    texts: list[list[str]] = []
    references: list[Any] = []
    for file in files:
        records: list[Record] = sorted(read_predictions(file).records, key=lambda record: str(record["question_id"]))
        mine = tuple(str(record["question_id"]) for record in records)
        if rows or texts:
            if mine != ids:
                return None, f"{file} has {len(mine):,} predictions, of other questions than {files[0]} ({len(ids):,})"
        else:
            ids, references = mine, [record.get("reference") for record in records]
        if captions:
            texts.append([record["prediction"] for record in records])
        else:
            rows.append([_score(task, record["prediction"], record.get("reference")) for record in records])
        advance()
    if captions:
        rows = caption_question_scores_of(texts, [reference or {} for reference in references])
    if any(score is None for row in rows for score in row):
        return None, f"{files[0]} has questions without public answers"
    scores = 100 * np.array(rows, dtype=np.float64)
    for run, mean in zip(runs, scores.mean(axis=1), strict=True):
        logged = run.mains[task]
        if abs(mean - logged) > TOLERANCE:
            return None, f"the predictions in {run.prediction_file(task)} score {mean:.2f}, the run logged {logged:.2f}"
    return Questions(task, ids, scores), ""
