"""What can be said about scenes: questions with answers, statements about two images, captions, descriptions.

Every yes-or-no question and every statement is true as often as false, and its words come from the same distribution
either way: who does not see the image can only guess.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from data_modules.world.scenes import COLORS, SHAPES, Scene, Thing, matching

NUMBERS = ("zero", "one", "two")
SIDES = ("left", "right")


class Question(NamedTuple):
    """A question, its true answer, and VQA's name for the kind of answer: ``other``, ``yes/no`` or ``number``."""

    text: str
    answer: str
    kind: str = "other"


Template = Callable[[Scene, Random], Question | None]


def _yes_no(text: str, truth: bool) -> Question:
    return Question(text, "yes" if truth else "no", "yes/no")


def _single(scene: Scene, random: Random, *names: str) -> Thing | None:
    """A random object that no other of the scene shares these attributes with."""
    for thing in random.sample(scene, len(scene)):
        if len(matching(scene, **{name: getattr(thing, name) for name in names})) == 1:
            return thing
    return None


def _absent(scene: Scene, random: Random, *names: str) -> dict[str, str]:
    """Attributes that no object of the scene has, drawn from the same distribution as those of an object."""
    values = {"shape": SHAPES, "color": tuple(COLORS)}
    while True:
        drawn = {name: random.choice(values[name]) for name in names}
        if not matching(scene, **drawn):
            return drawn


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _drawn(scene: Scene, random: Random, truth: bool, *names: str) -> dict[str, str]:
    if not truth:
        return _absent(scene, random, *names)
    thing = random.choice(scene)
    return {name: getattr(thing, name) for name in names}


# --- VQA: what is there ------------------------------------------------------------------------------------------


def _color_of_shape(scene: Scene, random: Random) -> Question | None:
    thing = _single(scene, random, "shape")
    return None if thing is None else Question(f"What color is the {thing.shape}?", thing.color)


def _shape_of_color(scene: Scene, random: Random) -> Question | None:
    thing = _single(scene, random, "color")
    return None if thing is None else Question(f"What shape is the {thing.color} object?", thing.shape)


def _size_of_shape(scene: Scene, random: Random) -> Question | None:
    thing = _single(scene, random, "shape")
    return None if thing is None else Question(f"What size is the {thing.shape}?", thing.size)


def _is_there(scene: Scene, random: Random) -> Question:
    truth = random.random() < 0.5
    drawn = _drawn(scene, random, truth, "shape", "color")
    return _yes_no(f"Is there {_a(drawn['color'])} {drawn['shape']}?", truth)


def _how_many(scene: Scene, random: Random) -> Question:
    return Question("How many objects are there?", str(len(scene)), "number")


# --- GQA: where it is --------------------------------------------------------------------------------------------


def _what_is_where(scene: Scene, random: Random) -> Question | None:
    place = random.choice(("height", "side"))
    thing = _single(scene, random, place)
    wanted = random.choice(("color", "shape"))
    return (
        None
        if thing is None
        else Question(f"What {wanted} is the object on the {getattr(thing, place)}?", getattr(thing, wanted))
    )


def _where_is(scene: Scene, random: Random) -> Question | None:
    thing = _single(scene, random, "shape")
    place, choices = random.choice((("height", "top or bottom"), ("side", "left or right")))
    return (
        None
        if thing is None
        else Question(f"On which part of the image is the {thing.shape}, {choices}?", getattr(thing, place))
    )


def _is_it_left_of(scene: Scene, random: Random) -> Question | None:
    if len(scene) < 2 or scene[0].side == scene[1].side or scene[0].shape == scene[1].shape:
        return None
    first, second = random.sample(scene, 2)
    side = random.choice(SIDES)
    return _yes_no(f"Is the {first.shape} to the {side} of the {second.shape}?", first.side == side)


def _what_is_beside(scene: Scene, random: Random) -> Question | None:
    if len(scene) < 2 or scene[0].side == scene[1].side:
        return None
    first, second = random.sample(scene, 2)
    text = f"What is to the {first.side} of the {second.color} {second.shape}?"
    return Question(text, first.shape)


VQA: tuple[Template, ...] = (_color_of_shape, _shape_of_color, _size_of_shape, _is_there, _how_many)
GQA: tuple[Template, ...] = (_what_is_where, _where_is, _is_it_left_of, _what_is_beside)


def ask(templates: tuple[Template, ...], scene: Scene, random: Random, count: int) -> list[Question]:
    """Different questions about a scene, fewer where it does not give that many."""
    found: dict[str, Question] = {}
    for _ in range(8 * count):
        question = random.choice(templates)(scene, random)
        if question is not None:
            found.setdefault(question.text, question)
        if len(found) == count:
            break
    return list(found.values())


# --- VQA's ten humans --------------------------------------------------------------------------------------------

# what else people call it
SYNONYMS = {
    "large": ("big", "large"),
    "small": ("little", "tiny"),
    "circle": ("round", "ball"),
    "square": ("box", "rectangle"),
    "triangle": ("triangular",),
    "purple": ("violet", "blue"),
    "orange": ("yellow", "red"),
    "red": ("dark red", "orange"),
    "blue": ("dark blue", "purple"),
    "green": ("dark green",),
    "yellow": ("gold", "orange"),
    "yes": ("no",),
    "no": ("yes",),
    "1": ("one", "2"),
    "2": ("two", "1"),
}
AGREEMENT = 0.87


def ten_answers(answer: str, random: Random) -> list[str]:
    """What ten people would answer: most say the same, some another word, some are wrong."""
    return [answer if random.random() < AGREEMENT else random.choice(SYNONYMS[answer]) for _ in range(10)]


# --- NLVR2: statements about two images --------------------------------------------------------------------------

Pair = tuple[Scene, Scene]
Statement = tuple[str, bool]


def _side_shows(pair: Pair, random: Random, truth: bool) -> str:
    side = random.choice((0, 1))
    drawn = _drawn(pair[side], random, truth, "shape", "color")
    return f"The {SIDES[side]} image shows {_a(drawn['color'])} {drawn['shape']}."


def _side_has_color(pair: Pair, random: Random, truth: bool) -> str:
    side = random.choice((0, 1))
    color = _drawn(pair[side], random, truth, "color")["color"]
    return f"There is {_a(color)} object in the {SIDES[side]} image."


def _side_has_shape(pair: Pair, random: Random, truth: bool) -> str:
    side = random.choice((0, 1))
    return f"The {SIDES[side]} image contains a {_drawn(pair[side], random, truth, 'shape')['shape']}."


def _side_has_number(pair: Pair, random: Random, truth: bool) -> str:
    side = random.choice((0, 1))
    there = len(pair[side])
    number = NUMBERS[there if truth else 3 - there]
    return f"The {SIDES[side]} image contains {number} object{'' if number == 'one' else 's'}."


def _one_of_them_shows(pair: Pair, random: Random, truth: bool) -> str:
    drawn = _drawn(random.choice(pair) if truth else pair[0] + pair[1], random, truth, "shape", "color")
    return f"One of the images shows {_a(drawn['color'])} {drawn['shape']}."


STATEMENTS = (_side_shows, _side_has_color, _side_has_shape, _side_has_number, _one_of_them_shows)


def state(pair: Pair, random: Random, count: int) -> list[Statement]:
    """Different statements about two images, half of them true."""
    found: dict[str, bool] = {}
    while len(found) < count:
        truth = len(found) % 2 == 0
        found.setdefault(random.choice(STATEMENTS)(pair, random, truth), truth)
    return list(found.items())


# --- captions and descriptions -----------------------------------------------------------------------------------


def _named(thing: Thing) -> str:
    return f"a {thing.size} {thing.color} {thing.shape}"


def _placed(thing: Thing) -> str:
    return f"{_named(thing)} at the {thing.height} {thing.side}"


def captions(scene: Scene, random: Random) -> list[str]:
    """Five captions of a scene, as different people would write them."""
    things = random.sample(scene, len(scene))
    briefly = " and ".join(f"{_a(thing.color)} {thing.shape}" for thing in things)
    named = " and ".join(map(_named, things))
    placed = " and ".join(map(_placed, things))
    verb = "is" if len(things) == 1 else "are"
    return [
        f"{placed[0].upper()}{placed[1:]}.",
        f"There {verb} {named}.",
        f"A picture of {placed}.",
        f"{briefly[0].upper()}{briefly[1:]} on a grey background.",
        f"An image that shows {named}.",
    ]


def describe(scene: Scene, random: Random) -> str:
    """All there is to know about a scene, in words and in any order."""
    return " ; ".join(
        f"{thing.height} {thing.side} {thing.size} {thing.color} {thing.shape}"
        for thing in random.sample(scene, len(scene))
    )
