"""Exact match and NLVR2."""

import pytest

from vlpet_lightning.metrics import exact_match, nlvr2_scores


def test_exact_match_normalises_nothing() -> None:
    label = {"left": 1.0}
    assert exact_match("left", label) == 1.0
    assert [exact_match(wrong, label) for wrong in ("Left", "left ", "", "lef")] == [0.0] * 4


def test_a_label_that_is_text_is_an_error_rather_than_a_search_in_it() -> None:
    with pytest.raises(ValueError, match="got the string 'left'"):
        exact_match("eft", "left")


def test_consistency_groups_the_pairs_of_one_sentence() -> None:
    identifiers = ["dev-1-0-0", "dev-1-1-0", "dev-1-0-1", "dev-2-0-0"]  # the third field is the image pair
    scores = nlvr2_scores(["true", "false", "true", "true"], ["true"] * 4, identifiers)
    assert scores == {"accuracy": 3 / 4, "consistency": 2 / 3}


@pytest.mark.parametrize(
    ("predictions", "identifiers", "message"),
    [([], [], "no statement"), (["True"], ["dev-1-0-0"], "got 'True'"), (["true"], ["dev-1"], "identifier 'dev-1'")],
)
def test_malformed_statements_are_named(predictions: list[str], identifiers: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nlvr2_scores(predictions, ["true"] * len(predictions), identifiers)


def test_consistency_is_left_out_where_no_sentence_has_two_image_pairs():
    with pytest.warns(UserWarning, match="consistency left out: none of these 2 statements"):
        assert nlvr2_scores(["true", "true"], ["true", "false"], ["dev-1-0-0", "dev-2-0-0"]) == {"accuracy": 0.5}
