"""Language about scenes: questions with answers, statements about two images, captions, descriptions.

Yes/no questions are balanced, with words from the same distribution for either answer, and every statement is true of
as many image pairs as it is false of: a model without access to the images can only guess.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from data_modules.world.scenes import COLORS, SHAPES, Scene, Thing, matching

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
    """Return a random object whose attributes no other object of the scene shares; None if there is none."""
    for thing in random.sample(scene, len(scene)):
        if len(matching(scene, **{name: getattr(thing, name) for name in names})) == 1:
            return thing
    return None


def _absent(scene: Scene, random: Random, *names: str) -> dict[str, str]:
    """Draw attributes that no object of the scene has, from the same distribution as those of objects."""
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


# --- VQA: objects and attributes ---------------------------------------------------------------------------------


def _what(wanted: str, given: str, text: str) -> Template:
    """Return a template that asks for one attribute of the object with another given attribute."""

    def template(scene: Scene, random: Random) -> Question | None:
        thing = _single(scene, random, given)
        return None if thing is None else Question(text.format(getattr(thing, given)), getattr(thing, wanted))

    return template


def _is_there(scene: Scene, random: Random) -> Question:
    truth = random.random() < 0.5
    drawn = _drawn(scene, random, truth, "shape", "color")
    return _yes_no(f"Is there {_a(drawn['color'])} {drawn['shape']}?", truth)


def _how_many(scene: Scene, random: Random) -> Question:
    return Question("How many objects are there?", str(len(scene)), "number")


# --- GQA: positions ----------------------------------------------------------------------------------------------


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
    beside = f"to the {first.side} of the {second.color} {second.shape}"
    if random.random() < 0.5:
        return Question(f"What is {beside}?", first.shape)
    return Question(f"What color is the object {beside}?", first.color)


VQA: tuple[Template, ...] = (
    _what("color", "shape", "What color is the {}?"),
    _what("color", "size", "What color is the {} object?"),
    _what("shape", "color", "What shape is the {} object?"),
    _what("size", "shape", "What size is the {}?"),
    _is_there,
    _how_many,
)
GQA: tuple[Template, ...] = (_what_is_where, _where_is, _is_it_left_of, _what_is_beside)


def ask(templates: tuple[Template, ...], scene: Scene, random: Random, count: int) -> list[Question]:
    """Return up to ``count`` distinct questions about a scene; fewer if the templates do not yield that many."""
    found: dict[str, Question] = {}
    for _ in range(8 * count):
        question = random.choice(templates)(scene, random)
        if question is not None:
            found.setdefault(question.text, question)
        if len(found) == count:
            break
    return list(found.values())


# --- VQA's ten humans --------------------------------------------------------------------------------------------

# other answers that people give
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
    """Simulate the answers of ten people: most agree, some use another word, some are wrong."""
    return [answer if random.random() < AGREEMENT else random.choice(SYNONYMS[answer]) for _ in range(10)]


# --- NLVR2: statements about two images --------------------------------------------------------------------------

Pair = tuple[Scene, Scene]


class Statement(NamedTuple):
    """A statement, and the predicate that decides its truth."""

    text: str
    holds: Callable[[Pair], bool]


def _side_shows(random: Random) -> Statement:
    side, shape, color = random.choice((0, 1)), random.choice(SHAPES), random.choice(list(COLORS))
    text = f"The {SIDES[side]} image shows {_a(color)} {shape}."
    return Statement(text, lambda pair: bool(matching(pair[side], shape=shape, color=color)))


def _side_has_color(random: Random) -> Statement:
    side, color = random.choice((0, 1)), random.choice(list(COLORS))
    text = f"There is {_a(color)} object in the {SIDES[side]} image."
    return Statement(text, lambda pair: bool(matching(pair[side], color=color)))


def _some_image_has_color(random: Random) -> Statement:
    color = random.choice(list(COLORS))
    text = f"There is {_a(color)} object in at least one image."
    return Statement(text, lambda pair: bool(matching(pair[0] + pair[1], color=color)))


def _some_image_shows(random: Random) -> Statement:
    shape, color = random.choice(SHAPES), random.choice(list(COLORS))
    text = f"At least one image shows {_a(color)} {shape}."
    return Statement(text, lambda pair: bool(matching(pair[0] + pair[1], shape=shape, color=color)))


STATEMENTS = (_side_shows, _side_has_color, _some_image_has_color, _some_image_shows)
TRIES = 200  # pairs tried per statement


def state(pairs: Sequence[Pair], random: Random, each: int = 2) -> tuple[str, list[tuple[int, bool]]]:
    """Draw a random statement, and equally many pairs of which it is true and false.

    Args:
        pairs: Pairs of scenes to choose from.
        random: Random generator.
        each: Number of pairs of either kind.

    Returns:
        The statement and ``(number of the pair, truth)`` of each pair, in random order.
    """
    while True:
        statement = random.choice(STATEMENTS)(random)
        found: dict[bool, list[int]] = {True: [], False: []}
        for number in random.sample(range(len(pairs)), min(TRIES, len(pairs))):
            found[statement.holds(pairs[number])].append(number)
            if min(map(len, found.values())) >= each:
                chosen = [(number, truth) for truth, numbers in found.items() for number in numbers[:each]]
                return statement.text, random.sample(chosen, len(chosen))


# --- captions and descriptions -----------------------------------------------------------------------------------


def captions(scene: Scene, random: Random) -> list[str]:
    """Write five captions of a scene in different styles, as different people would."""
    things = random.sample(scene, len(scene))
    plain = [f"{_a(thing.color)} {thing.shape}" for thing in things]
    sized = [f"a {thing.size} {thing.color} {thing.shape}" for thing in things]
    placed = [f"{name} at the {thing.height} {thing.side}" for name, thing in zip(plain, things, strict=True)]
    verb = "is" if len(things) == 1 else "are"
    sentences = [
        f"{_and(placed)}.",
        f"there {verb} {_and(sized)}.",
        f"a picture of {_and(sized)}.",
        f"{_and(plain)} on a grey background.",
        f"an image that shows {_and(plain)}.",
    ]
    return [sentence[0].upper() + sentence[1:] for sentence in sentences]


def _and(words: Sequence[str]) -> str:
    return " and ".join(words)


def mention(scene: Scene, random: Random) -> str:
    """List color and shape of every object in a scene, in random order; shorter than :func:`describe`."""
    return " ; ".join(f"{thing.color} {thing.shape}" for thing in random.sample(scene, len(scene)))


def describe(scene: Scene, random: Random) -> str:
    """List all attributes of every object in a scene, in random order."""
    return " ; ".join(
        f"{thing.height} {thing.side} {thing.size} {thing.color} {thing.shape}"
        for thing in random.sample(scene, len(scene))
    )
