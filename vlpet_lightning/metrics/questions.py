"""Score of each question, for people who look at predictions one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlpet_lightning.metrics.exact_match import exact_match
from vlpet_lightning.metrics.vqa import vqa_accuracy


def question_score(prediction: str, reference: Mapping[str, Any] | None) -> float | None:
    """Return the score of a prediction from 0 to 1; None for captions and for questions without a public answer.

    Args:
        prediction: The predicted text.
        reference: Reference as in :class:`vlpet_lightning.Batch`: human ``answers`` (the official VQA accuracy), a
            ``label`` that is a text or has scores by answer (exact match), or ``captions``.

    >>> question_score("net", {"answers": ["net"] * 2 + ["mesh"] * 8, "label": {"mesh": 1.0}})
    0.6
    >>> question_score("true", {"label": "true"}), question_score("left", {"label": {"right": 1.0}})
    (1.0, 0.0)
    >>> question_score("a dog", {"captions": ["a dog"]})
    """
    if not reference or "captions" in reference:
        return None
    if reference.get("answers"):
        return vqa_accuracy(prediction, reference["answers"])
    label = reference["label"]
    return float(prediction == label) if isinstance(label, str) else exact_match(prediction, label)


def truth(reference: Mapping[str, Any] | None) -> list[str]:
    """Return the true answers of a reference, the best or most frequent first; several captions."""
    if not reference:
        return []
    if "captions" in reference:
        return list(reference["captions"])
    if reference.get("answers"):
        counts: dict[str, int] = {}
        for answer in reference["answers"]:
            counts[answer] = counts.get(answer, 0) + 1
        return sorted(counts, key=lambda answer: -counts[answer])
    label = reference["label"]
    return [label] if isinstance(label, str) else sorted(label, key=lambda answer: -label[answer])


def caption_question_scores(predictions: Sequence[str], references: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the CIDEr of each caption within its split; their mean is the CIDEr of the split.

    Args:
        predictions: Captions of a whole split.
        references: Their references, with ``captions``.

    Raises:
        RuntimeError: If Java cannot be started.
    """
    from pycocoevalcap.cider.cider import Cider

    from vlpet_lightning.metrics.java import ptb_tokenize

    lines = iter(ptb_tokenize([" ".join(text.split()) for text in predictions]))
    texts = [[" ".join(text.split()) for text in reference["captions"]] for reference in references]
    tokens = iter(ptb_tokenize([text for some in texts for text in some]))
    truths = {str(i): [next(tokens) for _ in some] for i, some in enumerate(texts)}
    _, scores = Cider().compute_score(truths, {str(i): [next(lines)] for i in range(len(texts))})
    return [float(score) for score in scores]
