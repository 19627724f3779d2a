"""Scores by group of questions: question type, answer type, show, position of the answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import fsum
from typing import NamedTuple


class GroupScore(NamedTuple):
    """Mean score of a group, from 0 to 1, and the number of questions in it."""

    score: float
    questions: int


def mean(scores: Sequence[float]) -> float:
    """Return the mean; the order of summation has no effect, because fsum is exact."""
    return fsum(scores) / len(scores)


def group_scores(scores: Iterable[float], groups: Iterable[str | None]) -> dict[str, GroupScore]:
    """Return the mean score of each group, sorted by name.

    Args:
        scores: Score of each question.
        groups: Group of each question; questions without a group (None or an empty name) are left out.

    >>> group_scores([1.0, 0.0, 0.5], ["number", "yes/no", "number"])
    {'number': GroupScore(score=0.75, questions=2), 'yes/no': GroupScore(score=0.0, questions=1)}
    """
    found: dict[str, list[float]] = {}
    for score, group in zip(scores, groups, strict=True):
        if group:
            found.setdefault(group, []).append(score)
    return {name: GroupScore(mean(found[name]), len(found[name])) for name in sorted(found)}


def as_percent(groups: Mapping[str, GroupScore]) -> dict[str, dict[str, float | int]]:
    """Return groups as plain data for JSON, with scores in percent."""
    return {name: {"score": 100 * group.score, "questions": group.questions} for name, group in groups.items()}
