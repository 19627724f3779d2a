"""Prediction files: one JSON object per task and split, with the protocol of the run that made them."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]  # question_id, prediction, images, text, reference


class PredictionError(ValueError):
    """A file of predictions that cannot be used; names the file, the record and the cure."""


@dataclass
class Predictions:
    """Contents of a prediction file.

    Args:
        records: One mapping per question: ``question_id``, ``prediction``, ``images`` (ids), ``text`` and
            ``reference`` (see :class:`vlpet_lightning.Batch`; None if only an evaluation server has it).
        protocol: Record of the run; empty for older files, which are plain lists.
    """

    records: list[Record]
    protocol: dict[str, Any] = field(default_factory=dict)


def read_bytes(path: str | Path) -> bytes:
    """Return the contents of a file, decompressed if its name ends in ``.gz``.

    Raises:
        FileNotFoundError: If there is no such file.
        PredictionError: If it is not a complete gzip file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise PredictionError(f"{path} is not a complete gzip file ({error}): copy it again") from error


def as_json(predictions: Sequence[Record], protocol: Mapping[str, Any] | None = None) -> str:
    """Format predictions as a file's content."""
    content = {"protocol": dict(protocol or {}), "predictions": list(predictions)}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def is_ours(content: Any) -> bool:
    """Whether a decoded JSON document is a prediction file of ours, in the current or the older format."""
    if isinstance(content, dict):
        content = content.get("predictions")
    fields = {"question_id", "prediction"}
    first = content[0] if isinstance(content, list) and content else None
    return isinstance(first, dict) and fields <= first.keys()


def from_json(content: Any, path: str | Path) -> Predictions:
    """Return the predictions of a decoded JSON document.

    Raises:
        PredictionError: If it is no prediction file, or a record lacks a field.
    """
    records = content.get("predictions") if isinstance(content, dict) else content
    if not isinstance(records, list):
        raise PredictionError(f"{path} is no prediction file: it has no list of predictions")
    for number, record in enumerate(records):
        for name in ("question_id", "prediction"):
            if not isinstance(record, dict) or name not in record:
                raise PredictionError(f"{path}, record {number} has no {name}: predict again")
    return Predictions(records, dict(content.get("protocol") or {}) if isinstance(content, dict) else {})


def read_predictions(path: str | Path) -> Predictions:
    """Read a prediction file, ``.gz`` included.

    Raises:
        FileNotFoundError: If there is no such file.
        PredictionError: If it is no prediction file.
    """
    try:
        content = json.loads(read_bytes(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PredictionError(f"{path} is not valid JSON ({error}): it may be cut short, copy it again") from error
    return from_json(content, path)
