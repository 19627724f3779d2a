"""Accuracy and consistency on NLVR2 (lil-lab/nlvr, nlvr2/eval/metrics.py)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence


def consistency_group(identifier: str) -> str:
    """Return the identifier without its third field, which groups the image pairs of one sentence.

    Raises:
        ValueError: If there is no third field.

    >>> consistency_group("test1-128-2-0")
    'test1-128-0'
    """
    fields = identifier.split("-")
    if len(fields) < 3:
        raise ValueError(f"NLVR2 identifier {identifier!r} must read split-set-pair-sentence, such as test1-128-2-0")
    return "-".join(fields[:2] + fields[3:])


def nlvr2_scores(predictions: Sequence[str], labels: Sequence[str], identifiers: Sequence[str]) -> dict[str, float]:
    """Compute the shares of correct statements and of sentences that are correct for every image pair.

    Args:
        predictions: ``true`` or ``false`` for each statement.
        labels: ``true`` or ``false`` for each statement.
        identifiers: The benchmark's identifier of each statement.

    Returns:
        ``accuracy`` and ``consistency``, from 0 to 1. Consistency is left out with a warning if no sentence has two
        image pairs, because it would equal the accuracy.

    Raises:
        ValueError: If there is no statement, a value is neither true nor false, or an identifier is malformed.

    >>> nlvr2_scores(["true", "true", "false"], ["true", "false", "false"], ["dev-1-0-0", "dev-1-1-0", "dev-2-0-0"])
    {'accuracy': 0.6666666666666666, 'consistency': 0.5}
    """
    if not predictions:
        raise ValueError("no statement to score")
    unknown = next((value for value in (*predictions, *labels) if value not in ("true", "false")), None)
    if unknown is not None:
        raise ValueError(f"NLVR2 predictions and labels are 'true' or 'false', got {unknown!r}")
    right = [prediction == label for prediction, label in zip(predictions, labels, strict=True)]
    groups: dict[str, bool] = {}
    for identifier, is_right in zip(identifiers, right, strict=True):
        group = consistency_group(identifier)
        groups[group] = groups.get(group, True) and is_right
    accuracy = sum(right) / len(right)
    if len(groups) == len(right):
        warnings.warn(
            f"NLVR2 consistency left out: none of these {len(right)} statements is shown with two image pairs",
            stacklevel=2,
        )
        return {"accuracy": accuracy}
    return {"accuracy": accuracy, "consistency": sum(groups.values()) / len(groups)}
