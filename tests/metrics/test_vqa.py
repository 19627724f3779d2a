"""The VQA evaluators compared with results and quirks of the official one."""

import json
from pathlib import Path

import pytest

from vlpet_lightning.metrics import vqa_accuracy, vqa_accuracy_original, vqa_soft_score
from vlpet_lightning.metrics.vqa import CONTRACTIONS

CASES = Path(__file__).parents[2].parent / "shared" / "scoring" / "vqa_cases.json"


@pytest.mark.skipif(not CASES.exists(), reason=f"the scored cases are not beside the checkout ({CASES.name})")
def test_agrees_with_every_case_of_the_official_evaluator() -> None:
    cases = json.loads(CASES.read_text())["cases"]
    assert cases
    wrong = [c for c in cases if abs(100 * vqa_accuracy(c["prediction"], c["answers"]) - c["accuracy"]) > 1e-6]
    assert wrong == []


@pytest.mark.parametrize(("matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)])
def test_accuracy_leaves_out_each_human_in_turn(matches: int, expected: float) -> None:
    answers = ["cat"] * matches + ["dog"] * (10 - matches)
    assert vqa_accuracy("cat", answers) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("The DOG", "a dog"),  # case and articles
        ("two", "2"),
        ("none", "0"),
        ("dont", "don't"),
        ("somebody'd", "somebodyd"),  # the table's one reversed entry
        ("black/white", "black white"),  # a mark becomes a space ...
        ("black/ white", "black white"),  # ... and vanishes where it touches one
        ("10,000", "10000"),  # a comma between digits ...
        ("10,000-20", "1000020"),  # ... makes every mark vanish
        ("3.", "3"),  # the misspelt look-behind
        ("u.s.", "us"),
        ("red\tball\n", "red ball"),
    ],
)
def test_both_sides_are_cleaned_where_humans_disagree(prediction: str, answer: str) -> None:
    assert vqa_accuracy(prediction, [answer] * 9 + ["something else"]) == 1.0
    assert vqa_accuracy(answer, [prediction] * 9 + ["something else"]) == 1.0


@pytest.mark.parametrize(
    ("prediction", "answer"), [("1.5", "15"), ("It's", "its"), ("5%", "5"), ("t-shirt", "tshirt"), ("Im", "i'm")]
)
def test_what_the_official_evaluator_leaves_alone_stays_different(prediction: str, answer: str) -> None:
    assert vqa_accuracy(prediction, [answer] * 9 + ["something else"]) == 0.0


def test_humans_disagree_by_their_trimmed_texts() -> None:
    assert vqa_accuracy("dog", ["a dog"] * 5 + ["the dog"] * 5) == 1.0  # they differ, so all are normalised
    assert vqa_accuracy("a dog", ["dog"] * 5 + ["dog\n"] * 5) == 0.0  # they are equal but for white space


def test_only_32_periods_are_removed() -> None:
    assert vqa_accuracy("." * 32 + "no", ["no"] * 9 + ["yes"]) == 1.0
    assert vqa_accuracy("." * 33 + "no", ["no"] * 9 + ["yes"]) == 0.0


def test_unanimous_humans_are_matched_to_the_letter_but_for_outer_space() -> None:
    assert vqa_accuracy(" the dog\n", ["the dog "] * 10) == 1.0
    assert vqa_accuracy("dog", ["the dog"] * 10) == 0.0
    assert vqa_accuracy("The dog", ["the dog"] * 10) == 0.0


def test_the_original_cleans_the_prediction_always_and_the_humans_never_fully() -> None:
    assert vqa_accuracy_original("the dog", ["the dog"] * 10) == 0.0
    assert vqa_accuracy_original("The dog", ["dog"] * 10) == 1.0
    mixed = ["Two dogs!"] * 9 + ["cat"]
    assert vqa_accuracy_original("two dogs", mixed) == 0.0  # only their punctuation was normalised
    assert vqa_accuracy("two dogs", mixed) == 1.0
    assert vqa_accuracy_original("dogs", ["dogs!"] * 9 + ["cat"]) == 0.0  # a mark at the end becomes a space
    assert vqa_accuracy_original("t shirt", ["t-shirt"] * 9 + ["cat"]) == 1.0


def test_soft_score_is_that_of_the_equal_answer() -> None:
    assert vqa_soft_score("net", {"net": 0.9, "mesh": 0.3}) == 0.9
    assert vqa_soft_score("a net", {"net": 0.9}) == 0.0
    assert vqa_soft_score("net", {}) == 0.0


def test_contractions_lack_one_apostrophe() -> None:
    assert len(CONTRACTIONS) == 114  # the official table without entries with capitals (4) or without effect (2)
    assert CONTRACTIONS["yall'd've"] == CONTRACTIONS["y'all'dve"] == "y'all'd've"
    assert CONTRACTIONS["oclock"] == "o'clock"
    assert "its" not in CONTRACTIONS


@pytest.mark.parametrize("answers", [[], "dog"])
def test_no_list_of_answers_is_an_error(answers: list[str]) -> None:
    for function in (vqa_accuracy, vqa_accuracy_original):
        with pytest.raises(ValueError, match="non-empty list of human answers"):
            function("dog", answers)
