"""Text-only pretraining data about the world: source and target pairs that teach a language model the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from data_modules.world.language import GQA, SIDES, VQA, Template, ask, captions, describe, mention, state
from data_modules.world.language import Pair as ScenePair
from data_modules.world.scenes import random_scene
from vlpet_lightning.tasks import TASKS

POOL = 4000  # pairs of scenes to make statements about
Pair = dict[str, Any]  # source, target, kind; text and images, of which source consists


def text_pairs(count: int, random: Random) -> list[Pair]:
    """Create pairs about new scenes: a question, a statement or nothing, followed by a description; and the answer.

    ``text`` is the question or statement without prompt, and ``images`` the description of each image.
    """
    pool = [(random_scene(random), random_scene(random)) for _ in range(POOL)]
    pairs: list[Pair] = []
    while len(pairs) < count:
        pairs += _questions("vqa", VQA, random)
        pairs += _questions("gqa", GQA, random)
        pairs += _statements(pool, random)
        pairs += _captions(random)
    return pairs[:count]


def _pair(kind: str, text: str, images: Sequence[str], target: str) -> Pair:
    named = images if len(images) == 1 else [f"{name} : {image}" for name, image in zip(SIDES, images, strict=True)]
    source = " ".join(part for part in (text, " . ".join(named)) if part)
    return {
        "source": f"{TASKS[kind].prompt}{source}",
        "target": target,
        "kind": kind,
        "text": text,
        "images": list(images),
    }


def _questions(task: str, templates: tuple[Template, ...], random: Random) -> list[Pair]:
    scene = random_scene(random)
    return [
        _pair(task, question.text, [describe(scene, random)], question.answer)
        for question in ask(templates, scene, random, 2)
    ]


def _statements(pool: Sequence[ScenePair], random: Random) -> list[Pair]:
    text, chosen = state(pool, random)
    return [
        _pair("nlvr2", text, [mention(scene, random) for scene in pool[number]], "true" if truth else "false")
        for number, truth in chosen
    ]


def _captions(random: Random) -> list[Pair]:
    scene = random_scene(random)
    return [_pair("caption", "", [describe(scene, random)], random.choice(captions(scene, random)))]
