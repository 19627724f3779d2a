"""Text-only pretraining data about the world: source and target pairs that teach a language model the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from data_modules.world.language import GQA, VQA, Template, ask, captions, describe, mention, state
from data_modules.world.language import Pair as ScenePair
from data_modules.world.scenes import random_scene
from vlpet_lightning.tasks import TASKS

POOL = 4000  # pairs of scenes to make statements about
Pair = dict[str, str]  # source, target, kind


def text_pairs(count: int, random: Random) -> list[Pair]:
    """Create pairs about new scenes: a question, a statement or nothing, followed by a description; and the answer."""
    pool = [(random_scene(random), random_scene(random)) for _ in range(POOL)]
    pairs: list[Pair] = []
    while len(pairs) < count:
        pairs += _questions("vqa", VQA, random)
        pairs += _questions("gqa", GQA, random)
        pairs += _statements(pool, random)
        pairs += _captions(random)
    return pairs[:count]


def _pair(kind: str, source: str, target: str) -> Pair:
    return {"source": source, "target": target, "kind": kind}


def _questions(task: str, templates: tuple[Template, ...], random: Random) -> list[Pair]:
    scene = random_scene(random)
    return [
        _pair(task, f"{TASKS[task].prompt}{question.text} {describe(scene, random)}", question.answer)
        for question in ask(templates, scene, random, 2)
    ]


def _statements(pool: Sequence[ScenePair], random: Random) -> list[Pair]:
    text, chosen = state(pool, random)
    found = []
    for number, truth in chosen:
        left, right = (mention(scene, random) for scene in pool[number])
        source = f"{TASKS['nlvr2'].prompt}{text} left : {left} . right : {right}"
        found.append(_pair("nlvr2", source, "true" if truth else "false"))
    return found


def _captions(random: Random) -> list[Pair]:
    scene = random_scene(random)
    return [
        _pair("caption", f"{TASKS['caption'].prompt}{describe(scene, random)}", random.choice(captions(scene, random)))
    ]
