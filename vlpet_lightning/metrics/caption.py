"""Caption metrics against several references each, as computed by the COCO caption evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

Hypotheses = dict[str, list[str]]  # id -> [tokenised prediction]
Truths = dict[str, list[str]]  # id -> tokenised references


def _cider(truths: Truths, hypotheses: Hypotheses) -> dict[str, float]:
    from pycocoevalcap.cider.cider import Cider

    score = float(Cider().compute_score(truths, hypotheses)[0])
    if score == 0:
        perfect = {id: texts[:1] for id, texts in truths.items()}
        if Cider().compute_score(truths, perfect)[0] == 0:
            warnings.warn(
                f"CIDEr left out: it weighs n-grams by how few images have them, and with the references of these "
                f"{len(truths)} image(s) even a perfect caption scores 0. Score more images at once",
                stacklevel=2,
            )
            return {}
    return {"cider": score}


def _bleu(truths: Truths, hypotheses: Hypotheses) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu

    scores = Bleu(4).compute_score(truths, hypotheses, verbose=0)[0]
    longest = max(len(text.split()) for texts in hypotheses.values() for text in texts)
    # without any n-gram, the precision is a smoothing constant: a perfect three-word caption has a BLEU-4 of 3.2 %
    defined = 4 if longest == 0 else longest
    if defined < 4:
        warnings.warn(
            f"BLEU-{defined + 1} and higher left out: the longest of {len(hypotheses)} predictions has "
            f"{longest} word(s)",
            stacklevel=2,
        )
    return {f"bleu{n}": float(score) for n, score in enumerate(scores[:defined], start=1)}


def _rouge_l(truths: Truths, hypotheses: Hypotheses) -> dict[str, float]:
    from pycocoevalcap.rouge.rouge import Rouge

    return {"rouge_l": float(Rouge().compute_score(truths, hypotheses)[0])}


def _meteor(truths: Truths, hypotheses: Hypotheses) -> dict[str, float]:
    from vlpet_lightning.metrics.java import Meteor

    with Meteor() as meteor:
        return {"meteor": meteor.score([hypotheses[id][0] for id in truths], list(truths.values()))}


def _spice(truths: Truths, hypotheses: Hypotheses) -> dict[str, float]:
    from vlpet_lightning.metrics.java import spice

    return {"spice": spice(truths, hypotheses)}


SCORERS: dict[str, Callable[[Truths, Hypotheses], dict[str, float]]] = {
    "cider": _cider,
    "bleu": _bleu,
    "rouge_l": _rouge_l,
    "meteor": _meteor,
    "spice": _spice,
}
OPT_IN = ("spice",)  # downloads a parser at first use
DEFAULT = tuple(name for name in SCORERS if name not in OPT_IN)


def _some(ids: Iterable[str]) -> str:
    """Format the first few ids for an error message."""
    ordered = sorted(ids)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


def check_caption_metrics(metrics: Sequence[str]) -> None:
    """Refuse unknown metrics.

    Raises:
        ValueError: If a metric is unknown, or none is given; lists the known ones.
    """
    unknown = [name for name in metrics if name not in SCORERS]
    if unknown or isinstance(metrics, str) or not metrics:
        raise ValueError(f"unknown caption metrics {metrics!r}: choose some of {list(SCORERS)}")


def _check_captions(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    if not predictions:
        raise ValueError("no caption to score")
    alone = predictions.keys() - references.keys()
    if alone:
        raise ValueError(f"{len(alone)} predicted captions have no references: {_some(alone)}")
    missing = references.keys() - predictions.keys()
    if missing:
        raise ValueError(f"{len(missing)} images with references have no predicted caption: {_some(missing)}")
    letters = [id for id, captions in references.items() if isinstance(captions, str)]
    if letters:
        raise ValueError(f"references must be lists of captions, but are single strings for: {_some(letters)}")
    wordless = [id for id, captions in references.items() if not any(caption.split() for caption in captions)]
    if wordless:
        raise ValueError(f"{len(wordless)} images have no reference with a word in it: {_some(wordless)}")


def _one_line(caption: str) -> str:
    # the tokeniser works line by line: a stray U+2028 or form feed would shift every later caption
    return " ".join(caption.split())


def caption_scores(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    metrics: Sequence[str] = DEFAULT,
    done: Callable[[str], None] = lambda metric: None,
) -> dict[str, float]:
    """Compute the caption scores of a whole split.

    CIDEr weights n-grams by the number of images in the split with a reference that contains them, so a split must be
    scored at once: the scores of its parts do not average to the score of the whole. Empty predictions are scored as
    such.

    Args:
        predictions: Generated caption of each image id.
        references: Human captions of each image id; the same images as ``predictions``.
        metrics: Any of ``cider``, ``bleu`` (gives ``bleu1`` to ``bleu4``), ``rouge_l``, ``meteor`` and ``spice``, which
            downloads Stanford CoreNLP at first use.
        done: Called with the name of each metric once it is computed, for a progress bar.

    Returns:
        Scores by name, not multiplied by 100 and independent of the order of the images. Undefined scores are left out
        with a warning: CIDEr if even a perfect caption would get 0 (a single image), BLEU-n if no prediction has n
        words. If all predictions are empty, BLEU is 0.

    Raises:
        ValueError: If a metric is unknown, or an image has no prediction or no references; names the images.
        RuntimeError: If Java cannot be started.
    """
    check_caption_metrics(metrics)
    _check_captions(predictions, references)
    ids = sorted(predictions)
    from vlpet_lightning.metrics.java import ptb_tokenize

    lines = ptb_tokenize([_one_line(predictions[id]) for id in ids])
    hypotheses = {id: [line] for id, line in zip(ids, lines, strict=True)}
    tokenised = iter(ptb_tokenize([_one_line(caption) for id in ids for caption in references[id]]))
    truths = {id: [next(tokenised) for _ in references[id]] for id in ids}
    if not any(text for texts in truths.values() for text in texts):
        raise ValueError("no reference has a word in it, only punctuation")  # CIDEr would fail without giving a reason
    scores: dict[str, dict[str, float]] = {}
    with ThreadPoolExecutor(1) as pool:
        # METEOR takes most of the time, in a Java process of its own: the other metrics are computed meanwhile
        beside = {name: pool.submit(SCORERS[name], truths, hypotheses) for name in metrics if name == "meteor"}
        for name in sorted(metrics, key=lambda name: name in beside):
            scores[name] = beside[name].result() if name in beside else SCORERS[name](truths, hypotheses)
            done(name)
    return {key: score for name in metrics for key, score in scores[name].items()}
