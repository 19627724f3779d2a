"""Text for ``pretrain`` from sentences alone: put the hidden words back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from random import Random

MASK = "<mask>"
HIDDEN = 0.3  # share of words, as BART hides


def denoising_lines(sentences: Iterable[str], prompt: str, copies: int, seed: int) -> str:
    """Every sentence some times, each time with other words hidden.

    Args:
        sentences: Sentences; equal ones count once.
        prompt: Put before every source, as the task's own.
        copies: Times that a sentence comes.
        seed: Of the choice of words.

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
