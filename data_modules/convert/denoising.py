"""Denoising examples for ``pretrain``: restore the masked words of sentences."""

from __future__ import annotations

import json
from collections.abc import Iterable
from random import Random

MASK = "<mask>"
HIDDEN = 0.3  # share of masked words, as in BART


def denoising_lines(sentences: Iterable[str], prompt: str, copies: int, seed: int) -> str:
    """Create several denoising examples per sentence, each with other words masked.

    Args:
        sentences: Sentences; duplicates are dropped.
        prompt: Prefix of every source, such as the task's prompt.
        copies: Number of examples per sentence.
        seed: Seed of the choice of masked words.

    Returns:
        JSON lines of ``source``, ``target`` and ``kind``.
    """
    random = Random(seed)
    lines = []
    for sentence in dict.fromkeys(sentences):
        for _ in range(copies):
            words = [MASK if random.random() < HIDDEN else word for word in sentence.split()]
            lines.append(json.dumps({"source": prompt + " ".join(words), "target": sentence, "kind": "denoise"}))
    return "\n".join(lines) + "\n"
