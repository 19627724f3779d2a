"""Accuracy on multiple-choice questions with generated answers ``a0``, ``a1`` and so on (TVQA, How2QA)."""

from __future__ import annotations

from collections.abc import Sequence


def multiple_choice_scores(
    predictions: Sequence[str], answers: Sequence[str], choices: Sequence[int]
) -> dict[str, float]:
    """Compute exact match without normalisation (``TVQAEvaluator`` in src/video/tvqa_data.py of HenryHZY/VL-PET).

    Args:
        predictions: ``B`` generated texts.
        answers: ``B`` correct choices, ``a0``, ``a1`` and so on.
        choices: Number of choices of each question.

    Returns:
        ``accuracy``, and ``well_formed``: the share of predictions that name one of the question's choices.

    Raises:
        ValueError: If there is no question.

    >>> multiple_choice_scores(["a1", "a3", "a cat"], ["a1", "a0", "a2"], [4, 4, 4])
    {'accuracy': 0.3333333333333333, 'well_formed': 0.6666666666666666}
    """
    if not predictions:
        raise ValueError("no question to score")
    right = [prediction == answer for prediction, answer in zip(predictions, answers, strict=True)]
    formed = [
        text in {f"a{number}" for number in range(count)} for text, count in zip(predictions, choices, strict=True)
    ]
    return {"accuracy": sum(right) / len(right), "well_formed": sum(formed) / len(formed)}
