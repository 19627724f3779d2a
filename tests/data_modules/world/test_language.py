"""Statements about scenes: correct, and not predictable from the words alone."""

from collections import Counter, defaultdict
from random import Random

import pytest

from data_modules.world.language import (
    GQA,
    SYNONYMS,
    VQA,
    ask,
    captions,
    describe,
    mention,
    state,
    ten_answers,
)
from data_modules.world.scenes import CELLS, COLORS, PIXELS, SHAPES, SIZES, Thing, matching, random_scene, render
from data_modules.world.text import text_pairs
from vlpet_lightning.tasks import TASKS

RED_CIRCLE = Thing("circle", "red", "small", row=0, column=0)
BLUE_SQUARE = Thing("square", "blue", "large", row=3, column=3)
SCENE = (RED_CIRCLE, BLUE_SQUARE)

# question -> answer about SCENE, worked out by hand
ANSWERS = {
    "What color is the circle?": "red",
    "What color is the square?": "blue",
    "What color is the small object?": "red",
    "What color is the large object?": "blue",
    "What shape is the red object?": "circle",
    "What shape is the blue object?": "square",
    "What size is the circle?": "small",
    "What size is the square?": "large",
    "How many objects are there?": "2",
    "Is there a red circle?": "yes",
    "Is there a blue square?": "yes",
    "What color is the object on the top?": "red",
    "What shape is the object on the bottom?": "square",
    "What color is the object on the left?": "red",
    "What shape is the object on the right?": "square",
    "On which part of the image is the circle, top or bottom?": "top",
    "On which part of the image is the circle, left or right?": "left",
    "On which part of the image is the square, top or bottom?": "bottom",
    "Is the circle to the left of the square?": "yes",
    "Is the circle to the right of the square?": "no",
    "Is the square to the right of the circle?": "yes",
    "What is to the left of the blue square?": "circle",
    "What is to the right of the red circle?": "square",
    "What color is the object to the right of the red circle?": "blue",
}


def asked(templates, scene, count=300):
    return {question.text: question for seed in range(count) for question in ask(templates, scene, Random(seed), 4)}


def test_answers_are_true():
    questions = asked(VQA + GQA, SCENE)
    assert set(questions) >= set(ANSWERS)
    for text, answer in ANSWERS.items():
        assert questions[text].answer == answer
    assert {q.answer for text, q in questions.items() if text.startswith("Is there") and text not in ANSWERS} == {"no"}


def test_questions_about_a_scene_differ():
    texts = [question.text for question in ask(VQA, SCENE, Random(0), 4)]
    assert len(set(texts)) == len(texts) == 4


def test_nothing_is_asked_that_has_no_single_answer():
    twins = (RED_CIRCLE, Thing("circle", "blue", "small", row=0, column=1))
    texts = set(asked(VQA + GQA, twins))
    assert not texts & {"What color is the circle?", "What size is the circle?", "What color is the small object?"}
    assert not any("on the top" in text or "on the left" in text or "to the left of" in text for text in texts)


def test_yes_and_no_are_equally_likely_whatever_the_words():
    random = Random(0)
    said = defaultdict(Counter)
    for _ in range(20_000):
        for question in ask(VQA + GQA, random_scene(random), random, 2):
            if question.kind == "yes/no":
                said[question.text][question.answer] += 1
    total = sum(said.values(), Counter())
    assert total["yes"] / total.total() == pytest.approx(0.5, abs=0.02)
    frequent = [counts for counts in said.values() if counts.total() > 300]
    assert len(frequent) > 10
    for counts in frequent:
        assert counts["yes"] / counts.total() == pytest.approx(0.5, abs=0.12)  # four standard errors


def test_a_statement_is_true_and_false_of_as_many_pairs():
    random = Random(0)
    pool = [(random_scene(random), random_scene(random)) for _ in range(400)]
    texts = set()
    for _ in range(200):
        text, chosen = state(pool, random)
        texts.add(text)
        assert sorted(truth for _, truth in chosen) == [False, False, True, True]
        assert len({number for number, _ in chosen}) == 4
    assert len(texts) > 40


@pytest.mark.parametrize(
    ("pair", "text", "truth"),
    [
        (((RED_CIRCLE,), (BLUE_SQUARE,)), "The left image shows a red circle.", True),
        (((RED_CIRCLE,), (BLUE_SQUARE,)), "The right image shows a red circle.", False),
        (((RED_CIRCLE,), (BLUE_SQUARE,)), "There is a blue object in the right image.", True),
        (((RED_CIRCLE,), (BLUE_SQUARE,)), "There is a green object in at least one image.", False),
        (((RED_CIRCLE,), (BLUE_SQUARE,)), "There is a blue object in at least one image.", True),
        (((RED_CIRCLE,), (BLUE_SQUARE,)), "There is a red object in at least one image.", True),
        (((RED_CIRCLE,), (BLUE_SQUARE,)), "At least one image shows a blue square.", True),
    ],
)
def test_statements_mean_what_they_say(pair, text, truth):
    random = Random(1)
    pool = [pair] + [(random_scene(random), random_scene(random)) for _ in range(60)]
    for _ in range(4000):
        said, chosen = state(pool, random, each=1)
        if said == text and any(number == 0 for number, _ in chosen):
            assert dict(chosen)[0] is truth
            return
    pytest.fail(f"{text!r} was never said of the pair")


def test_captions_name_every_object_and_differ():
    five = captions(SCENE, Random(0))
    assert len(set(five)) == 5
    for caption in five:
        assert "red circle" in caption.lower()
        assert "blue square" in caption.lower()


def test_a_description_says_all_there_is():
    assert set(describe(SCENE, Random(0)).split(" ; ")) == {
        "top left small red circle",
        "bottom right large blue square",
    }
    assert set(mention(SCENE, Random(0)).split(" ; ")) == {"red circle", "blue square"}


def test_texts_can_be_answered_from_what_they_describe():
    pairs = text_pairs(600, Random(0))
    asked = [pair for pair in pairs if pair["kind"] in ("vqa", "gqa")]
    assert len(asked) > 200
    for pair in asked:
        question, described = pair["source"].split("?")
        if question.endswith("How many objects are there"):
            assert pair["target"] == str(described.count(";") + 1)
        elif pair["target"] not in ("yes", "no"):
            assert pair["target"] in described.split()
        elif "Is there" in question:
            *_, color, shape = question.split()
            assert (f"{color} {shape}" in described) == (pair["target"] == "yes")


def test_texts_come_with_their_parts_for_models_with_a_place_for_images():
    for pair in text_pairs(100, Random(0)):
        assert len(pair["images"]) == TASKS[pair["kind"]].images
        assert pair["source"].startswith(TASKS[pair["kind"]].prompt + pair["text"])
        assert all(image in pair["source"] for image in pair["images"])


def test_most_humans_agree_and_some_do_not():
    said = [ten_answers(answer, Random(seed)) for seed in range(200) for answer in ("red", "yes", "2")]
    agreed = [answers.count(max(set(answers), key=answers.count)) for answers in said]
    assert 7 < sum(agreed) / len(agreed) < 9.9
    assert any(len(set(answers)) > 1 for answers in said)


def test_every_answer_has_something_else_that_people_call_it():
    assert {*SHAPES, *COLORS, *SIZES, "yes", "no", "1", "2"} <= set(SYNONYMS)


def test_scenes_have_one_or_two_different_objects():
    scenes = [random_scene(Random(seed)) for seed in range(300)]
    assert {len(scene) for scene in scenes} == {1, 2}
    for scene in scenes:
        assert len({(thing.row, thing.column) for thing in scene}) == len(scene)
        assert len({(thing.shape, thing.color) for thing in scene}) == len(scene)


def test_objects_are_drawn_where_they_are_and_in_their_color():
    scene = (RED_CIRCLE, Thing("square", "blue", "large", row=1, column=3))
    image = render(scene, Random(0))
    cell = PIXELS // CELLS
    assert image.size == (PIXELS, PIXELS)
    for thing in scene:
        found = image.getpixel(((thing.column * cell) + cell // 2, (thing.row * cell) + cell // 2))
        assert max(abs(a - b) for a, b in zip(found, COLORS[thing.color], strict=True)) < 20
    empty = image.getpixel((2 * cell, cell))
    assert min(empty) > 190


def test_attributes_select_objects():
    assert matching(SCENE, side="left") == [RED_CIRCLE]
    assert matching(SCENE, height="bottom", color="blue") == [BLUE_SQUARE]
    assert matching(SCENE, color="green") == []
