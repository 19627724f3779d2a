"""What a reader of annotations makes: rows, and the columns that a split becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class AnnotationError(ValueError):
    """An annotation file that cannot be used; says which file, which record and what is wrong."""


class Row(NamedTuple):
    """One sample as a reader hands it over.

    Args:
        id: Question id, unique within task and split.
        text: Input without the prompt.
        images: Image ids.
        label: Answer to score; empty where nothing is to be learnt.
        reference: What the task's metric compares a prediction with; see :class:`vlpet_lightning.Batch`. Empty where
            an evaluation server keeps it.
    """

    id: str
    text: str
    images: tuple[str, ...]
    label: dict[str, float]
    reference: dict[str, Any]


@dataclass
class Samples:
    """The samples of one split as columns of ``n`` rows.

    Args:
        ids: ``n`` question ids.
        texts: ``n`` inputs without the prompt and without subtitles.
        images: ``n`` tuples of image ids.
        answers: The answers of all samples, one sample after the other.
        scores: The score of each answer.
        offsets: ``(n + 1,)``: the answers of row ``i`` are ``offsets[i]`` to ``offsets[i + 1]``.
        references: ``n`` references; empty for a training split, and where an evaluation server keeps them.
        subtitles: The subtitles of each clip, where the task has some.
    """

    ids: list[str]
    texts: list[str]
    images: list[tuple[str, ...]]
    answers: list[str]
    scores: np.ndarray
    offsets: np.ndarray
    references: list[dict[str, Any]] = field(default_factory=list)
    subtitles: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


RecordRows = Callable[[dict[str, Any], str], Iterable[Row]]


@dataclass(frozen=True)
class Reader:
    """How a task's records become rows.

    Args:
        rows: ``rows(record, split)`` gives the rows of one record, none where it belongs to another split.
        key: The key of the list of records in a file; None where the file is that list, or has a record a line.
        complete: ``complete(root, samples)`` adds to the references of an evaluation split what lies in other files.
        by_clip: Like ``rows``, with all references of a clip in one row, to evaluate each clip once.
    """

    rows: RecordRows
    key: str | None = None
    complete: Callable[[Path, Samples], None] | None = None
    by_clip: RecordRows | None = None
