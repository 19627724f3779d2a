"""Score of each question, for people who look at predictions one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlpet_lightning.metrics.exact_match import exact_match
from vlpet_lightning.metrics.vqa import vqa_accuracy, vqa_soft_score


def question_score(prediction: str, reference: Mapping[str, Any] | None) -> float | None:
    """Return the score of a prediction from 0 to 1; None for captions and for questions without a public answer.

    Args:
        prediction: The predicted text.
        reference: Reference as in :class:`vlpet_lightning.Batch`: human ``answers`` (the official VQA accuracy; if the
            list is empty, the soft score in ``label``), a ``label`` that is a text or has scores by answer (exact
            match), or ``captions``.

    >>> question_score("net", {"answers": ["net"] * 2 + ["mesh"] * 8, "label": {"mesh": 1.0}})
    0.6
    >>> question_score("net", {"answers": [], "label": {"net": 0.3}}), question_score("net", {"label": {}})
    (0.3, None)
    >>> question_score("true", {"label": "true"}), question_score("left", {"label": {"right": 1.0}})
    (1.0, 0.0)
    >>> question_score("a dog", {"captions": ["a dog"]})
    """
    if not reference or "captions" in reference:
        return None
    if reference.get("answers"):
        return vqa_accuracy(prediction, reference["answers"])
    label = reference.get("label")
    if not label:
        return None
    if isinstance(label, str):
        return float(prediction == label)
    return vqa_soft_score(prediction, label) if "answers" in reference else exact_match(prediction, label)


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
    label = reference.get("label") or {}
    return [label] if isinstance(label, str) else sorted(label, key=lambda answer: -label[answer])


def caption_question_scores(predictions: Sequence[str], references: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Return the CIDEr of each caption within its split; see :func:`caption_question_scores_of`."""
    return caption_question_scores_of([predictions], references)[0]


def caption_question_scores_of(
    runs: Sequence[Sequence[str]], references: Sequence[Mapping[str, Any]]
) -> list[list[float | None]]:
    """Return the CIDEr of each caption within its split, for several runs; the mean of a run is the CIDEr of the split.

    Args:
        runs: Captions of a whole split, for each run.
        references: Their references, with ``captions``.

    Returns:
        CIDEr for each run, from 0 to 10. None for images without a reference, and for all images if even perfect
        captions would get 0, as with a single image.

    Raises:
        RuntimeError: If Java cannot be started.
    """
    from pycocoevalcap.cider.cider import Cider

    from vlpet_lightning.metrics.java import ptb_tokenize

    texts = [[" ".join(text.split()) for text in reference.get("captions") or []] for reference in references]
    scored = [i for i, some in enumerate(texts) if any(some)]
    found: list[list[float | None]] = [[None] * len(texts) for _ in runs]
    if not scored:
        return found
    lines = iter(ptb_tokenize([" ".join(predictions[i].split()) for predictions in runs for i in scored]))
    tokens = iter(ptb_tokenize([text for i in scored for text in texts[i]]))
    truths = {str(i): [next(tokens) for _ in texts[i]] for i in scored}
    perfect = {id: some[:1] for id, some in truths.items()}
    defined: bool | None = None
    for row in found:
        mean, scores = Cider().compute_score(truths, {str(i): [next(lines)] for i in scored})
        if mean == 0 and defined is None:
            defined = Cider().compute_score(truths, perfect)[0] != 0
        if mean == 0 and not defined:
            continue
        for i, score in zip(scored, scores, strict=True):  # in the order of ``truths``
            row[i] = float(score)
    return found
