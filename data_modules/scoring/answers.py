"""Predictions to score: from our own prediction files or from the result files of evaluation servers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_modules.scoring.truths import Truths, image_keys
from vlpet_lightning.prediction_files import PredictionError, Predictions, Record, from_json, is_ours, read_bytes
from vlpet_lightning.submissions import FORMATS

SHOWN = 5
PEEK = 1 << 16  # bytes that decide a file's format


class ScoringError(ValueError):
    """Predictions that cannot be scored; names the ids and the cure."""


@dataclass
class Answers:
    """Predictions of a file.

    Args:
        pairs: Id and prediction of every entry; ids may repeat.
        protocol: Record of the run that made them, if the file has one.
    """

    pairs: list[tuple[str, str]]
    protocol: dict[str, Any] = field(default_factory=dict)


def read_answers(task: str, path: Path, truths: Truths) -> Answers:
    """Read predictions, in our own format or in that of the task's evaluation server.

    Args:
        task: Name of a task.
        path: File of predictions; ``.gz`` is decompressed.
        truths: References, whose ids the result uses.

    Raises:
        FileNotFoundError: If there is no such file.
        PredictionError: If the file is damaged.
        SubmissionError: If it has neither format.
    """
    content = read_bytes(path)
    ours = _ours(content, path)
    if ours is not None:
        pairs = [(_key(task, record, truths), str(record["prediction"])) for record in ours.records]
        return Answers(pairs, ours.protocol)
    pairs = FORMATS[task].read(content, str(path))
    return Answers([(truths.aliases.get(id, id), text) for id, text in pairs])


def _ours(content: bytes, path: Path) -> Predictions | None:
    """Return the predictions of a file in our own format, None for another format."""
    start = content[:PEEK]
    if not (b'"predictions"' in start or (b'"question_id"' in start and b'"prediction"' in start)):
        return None  # decoding hundreds of thousands of entries twice takes time
    try:
        document = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PredictionError(f"{path} is not valid JSON ({error}): it may be cut short, copy it again") from error
    return from_json(document, path) if is_ours(document) else None


def _key(task: str, record: Record, truths: Truths) -> str:
    reference = record.get("reference") or {}
    id = str(record["question_id"])
    if task == "caption":
        return id if id in truths.references else image_keys([id])[id]
    return str(reference.get(FORMATS[task].key, reference.get(f"{FORMATS[task].key}_id", truths.aliases.get(id, id))))


def listed(what: str, ids: Collection[str]) -> str:
    """Return the number of ids and the first few of them."""
    some = sorted(ids)
    more = f" and {len(some) - SHOWN:,} more" if len(some) > SHOWN else ""
    return f"{len(some):,} {what}: {', '.join(some[:SHOWN])}{more}"


def matched(
    answers: Iterable[tuple[str, str]], references: Mapping[str, Any], *, partial: bool, source: str
) -> tuple[dict[str, str], list[str]]:
    """Return the predictions of the questions that have references.

    Args:
        answers: Id and prediction of every entry.
        references: Questions to score.
        partial: Score the questions that have both, instead of raising an error.
        source: Name of the prediction file, for messages.

    Returns:
        The predictions by id, in the order of the references, and one line for each kind of id that was left out.

    Raises:
        ScoringError: If ids are missing, unknown or repeated; counts and lists each kind. With ``partial``, only if an
            id is repeated with another prediction, or nothing is left.
    """
    answers = list(dict.fromkeys(answers)) if partial else list(answers)
    said = dict(answers)
    counts = Counter(id for id, _ in answers) if len(said) < len(answers) else {}
    repeated = [id for id, count in counts.items() if count > 1]
    problems = [
        listed(what, ids)
        for what, ids in (
            ("questions without a prediction", references.keys() - said.keys()),
            ("predictions of unknown questions", said.keys() - references.keys()),
        )
        if ids
    ]
    if repeated:
        twice = listed("ids that come more than once", repeated)
        raise ScoringError("; ".join([f"{source}: {twice}", *(problems if not partial else [])]))
    if problems and not partial:
        raise ScoringError(
            f"{source}: {'; '.join(problems)}. Predict the whole split, or add --partial to score the questions that "
            "have both"
        )
    found = {id: said[id] for id in references if id in said}
    if not found:
        raise ScoringError(f"{source}: no question has both a prediction and a reference: {'; '.join(problems)}")
    return found, problems
