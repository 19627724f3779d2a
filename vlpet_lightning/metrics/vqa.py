"""Accuracy of free-form answers to visual questions, against ten human answers.

Two evaluators are in use, and they disagree. Both normalise the text before they compare. Both score an answer by the
mean of ``min(1, matching humans / 3)`` over leaving out one human at a time:

====================  ===============================================  ==============================================
step                  official (:func:`vqa_accuracy`)                  the VL-PET repository's
                                                                       (:func:`vqa_accuracy_original`)
====================  ===============================================  ==============================================
source                GT-Vision-Lab/VQA, vqaEval.py, current revision  HenryHZY/VL-PET, src/vqa_clip_data.py,
                                                                       ``evaluate_raw`` (an older official revision)
prediction            normalised only if the humans disagree           always normalised
human answers         trimmed; normalised like the prediction if they  if they disagree, punctuation only: case,
                      disagree                                         articles and number words stay
====================  ===============================================  ==============================================

For example, if all ten humans said ``the dog``, the prediction ``the dog`` is right for the official evaluator and
wrong for the repository's, which removes the article only from the prediction.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

# Correct spellings: the evaluator repairs words that lack one of their apostrophes. Its table also has entries with a
# capital I (``Im``), which never match because words are lower-cased first.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""

CONTRACTIONS: dict[str, str] = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED.split() for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # sic: the only entry that removes an apostrophe

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS: dict[str, str] = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
ARTICLES = frozenset({"a", "an", "the"})
PUNCTUATION = frozenset(';/[]"{}()=+\\_-><@`,?!')

_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# The official expression is meant to keep a period after a digit too, but its look-behind is misspelt `(?!<=\d)`,
# which always holds: only a digit after the period keeps it.
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the official call passes `re.UNICODE` as the parameter `count`
CACHED = 1 << 16  # texts; answers repeat a lot


@lru_cache(maxsize=CACHED)
def _trim(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=CACHED)
def _strip_punctuation(text: str) -> str:
    """Drop marks that touch a space anywhere (all marks if a number has a comma); replace the others by spaces."""
    marks = PUNCTUATION.intersection(text)
    if marks:
        drop_all = _DIGIT_COMMA_DIGIT.search(text) is not None
        touching = {mark for mark in marks if drop_all or f"{mark} " in text or f" {mark}" in text}
        text = text.translate({ord(mark): "" if mark in touching else " " for mark in marks})
    return _PERIOD.sub("", text, count=_MOST_PERIODS)


def _normalise_words(text: str) -> str:
    words = (NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=CACHED)
def _clean(text: str) -> str:
    return _normalise_words(_strip_punctuation(text))


@lru_cache(maxsize=CACHED)
def _clean_trimmed(text: str) -> str:
    return _clean(_trim(text))


def _leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """Average ``min(1, matches among the others / 3)`` over the humans, rounded once."""
    humans, matches = len(answers), answers.count(prediction)
    if matches == 0:
        return 0.0
    thirds = matches * min(3, matches - 1) + (humans - matches) * min(3, matches)
    return thirds / (3 * humans)


def _check_answers(answers: Sequence[str]) -> None:
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers must be a non-empty list of human answers, got {answers!r}")


def vqa_accuracies(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """Return :func:`vqa_accuracy` and :func:`vqa_accuracy_original` of one prediction.

    >>> vqa_accuracies("the dog", ["the dog"] * 10)
    (1.0, 0.0)
    """
    _check_answers(answers)
    cleaned = _clean_trimmed(prediction)
    if len(set(answers)) == 1:
        return _leave_one_out(_trim(prediction), list(map(_trim, answers))), _leave_one_out(cleaned, answers)
    original = _leave_one_out(cleaned, list(map(_strip_punctuation, answers)))
    others = list(map(_clean_trimmed, answers))
    if len(set(others)) > 1 or len(set(map(_trim, answers))) > 1:  # texts that clean to different ones do differ
        return _leave_one_out(cleaned, others), original
    return _leave_one_out(_trim(prediction), list(map(_trim, answers))), original


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Compute the accuracy of one prediction as the official VQA evaluation code does.

    Args:
        prediction: The generated answer.
        answers: The human answers (ten in VQAv2).

    Returns:
        A number from 0 to 1.

    Raises:
        ValueError: If there is no human answer.

    >>> vqa_accuracy("Two dogs!", ["2 dogs"] * 2 + ["dogs"] * 8)
    0.6
    >>> vqa_accuracy("frisbee", ["frisbee"] * 10)
    1.0
    """
    return vqa_accuracies(prediction, answers)[0]


def vqa_accuracy_original(prediction: str, answers: Sequence[str]) -> float:
    """Compute the accuracy of one prediction as the VL-PET repository does; the table above lists the differences.

    Args:
        prediction: The generated answer.
        answers: The human answers (ten in VQAv2).

    Returns:
        A number from 0 to 1.

    Raises:
        ValueError: If there is no human answer.

    >>> vqa_accuracy_original("the dog", ["the dog"] * 10), vqa_accuracy("the dog", ["the dog"] * 10)
    (0.0, 1.0)
    """
    return vqa_accuracies(prediction, answers)[1]


def vqa_soft_score(prediction: str, label: Mapping[str, float]) -> float:
    """Return the label's score of the answer that equals the prediction, unnormalised (``VQAEvaluator.evaluate``).

    >>> vqa_soft_score("net", {"net": 1.0, "mesh": 0.3}), vqa_soft_score("Net", {"net": 1.0})
    (1.0, 0.0)
    """
    return float(label.get(prediction, 0.0))
