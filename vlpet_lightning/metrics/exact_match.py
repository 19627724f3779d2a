"""Exact match of an answer, as the VL-PET repository scores GQA."""

from __future__ import annotations

from collections.abc import Container


def exact_match(prediction: str, label: Container[str]) -> float:
    """Return 1 if the prediction equals an answer of the label exactly, else 0; no normalisation (gqa_clip_data.py).

    >>> exact_match("left", {"left": 1.0}), exact_match("Left", {"left": 1.0})
    (1.0, 0.0)
    """
    if isinstance(label, str):  # `in` would search for a substring
        raise ValueError(f"label must map answers to scores, got the string {label!r}")
    return float(prediction in label)
