"""Data structures of annotation readers: rows, and the columns of a split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_modules.annotations.columns import CodedTuples


class AnnotationError(ValueError):
    """Raised for an annotation file that cannot be used; names the file, the record and the problem."""


class Row(NamedTuple):
    """One sample, as yielded by a reader.

    Args:
        id: Question id, unique within task and split.
        text: Input without the prompt.
        images: Image ids.
        label: Scores by answer; empty if there is no training target.
        reference: Reference for the task's metric; see :class:`vlpet_lightning.Batch`. Empty if only an evaluation
            server has it.
    """

    id: str
    text: str
    images: tuple[str, ...]
    label: dict[str, float]
    reference: dict[str, Any]


@dataclass
class Samples:
    """The samples of one split as columns of ``n`` rows.

    A split that was read from files has :class:`~data_modules.annotations.columns.Column` objects, not lists.

    Args:
        ids: ``n`` question ids.
        texts: ``n`` inputs without the prompt and without subtitles.
        images: ``n`` tuples of image ids.
        answers: Concatenated answers of all samples.
        scores: Score of each answer.
        offsets: ``(n + 1,)``: the answers of row ``i`` are ``offsets[i]`` to ``offsets[i + 1]``.
        references: ``n`` references; empty for a training split, or if only an evaluation server has them.
        subtitles: Subtitles by clip, if the task has subtitles.
    """

    ids: Sequence[str]
    texts: Sequence[str]
    images: Sequence[tuple[str, ...]]
    answers: Sequence[str]
    scores: np.ndarray
    offsets: np.ndarray
    references: list[dict[str, Any]] = field(default_factory=list)
    subtitles: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


def images_of(samples: Samples) -> set[str]:
    """Return the ids of all images of a split."""
    if isinstance(samples.images, CodedTuples):
        return set(samples.images.values)
    return {image for images in samples.images for image in images}


RecordRows = Callable[[dict[str, Any], str], Iterable[Row]]


@dataclass(frozen=True)
class Reader:
    """Conversion of a task's records to rows.

    Args:
        rows: ``rows(record, split)`` yields the rows of one record, none if it belongs to another split.
        key: Key of the list of records in a file; None if the file itself is the list, or has one record per line.
        complete: ``complete(root, samples)`` completes the references of an evaluation split from other files.
        by_clip: Like ``rows``, with all references of a clip in one row, to evaluate each clip once.
    """

    rows: RecordRows
    key: str | None = None
    complete: Callable[[Path, Samples], None] | None = None
    by_clip: RecordRows | None = None
