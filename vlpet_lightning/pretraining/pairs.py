"""Pairs of source and target texts: reading, tokenising and padding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlpet_lightning.backbones import ADDED_TOKENS
from vlpet_lightning.batch import IGNORED


class Pair(NamedTuple):
    """Source text, target text and kind from one line of a text file.

    ``text`` and ``images`` are the parts of the source, a question and the description of each image, for models whose
    prompt has a place for images; None in files without them.
    """

    source: str
    target: str
    kind: str
    text: str | None = None
    images: tuple[str, ...] | None = None


def read_pairs(path: Path) -> list[Pair]:
    """Read a file of JSON lines with ``source``, ``target`` and ``kind``.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is empty, or a line is not such an object; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no text at {path}: make it with `python -m vlpet_lightning data synthetic --out DIR` and give --text "
            "DIR/text"
        )
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            images = entry.get("images")
            parts = (entry.get("text"), None if images is None else tuple(images))
            pairs.append(Pair(entry["source"], entry["target"], entry["kind"], *parts))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number} is not a JSON object with source, target and kind ({error!r}): {line[:80]!r}"
            ) from error
    if not pairs:
        raise ValueError(f"{path} is empty: expected one JSON object with source, target and kind a line")
    return pairs


class Pairs:
    """Tokenised pairs, padded per batch.

    Args:
        pairs: Pairs of texts.
        tokenizer: Tokenizer of both texts.

    Raises:
        ValueError: If a text contains a token that is reserved for images.
    """

    def __init__(self, pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> None:
        self.pad = int(tokenizer.pad_token_id)
        self.sources: list[list[int]] = tokenizer([pair.source for pair in pairs])["input_ids"]
        self.targets: list[list[int]] = tokenizer([pair.target for pair in pairs])["input_ids"]
        first = len(tokenizer) - len(ADDED_TOKENS)
        for pair, *ids in zip(pairs, self.sources, self.targets, strict=True):
            if max(map(max, ids)) >= first:
                raise ValueError(f"a text holds a token that is reserved for images (<extra_id_0> and so on): {pair}")

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def longest(self) -> int:
        """Length of the longest text in tokens."""
        return max(map(len, self.sources + self.targets))

    def order(self, batch_size: int, steps: int, seed: int) -> list[np.ndarray]:
        """Draw the rows of every batch of a run, epoch by epoch.

        Batches are not sorted by length: each would then contain a single kind of pair, and the loss stays far higher.
        """
        random = np.random.default_rng(seed)
        batches: list[np.ndarray] = []
        while len(batches) < steps:
            batches += np.array_split(random.permutation(len(self)), -(-len(self) // batch_size))
        return batches[:steps]

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Build right-padded ``(B, T)`` source ids and ``(B, L)`` labels."""
        return (
            padded([self.sources[row] for row in rows], self.pad),
            padded([self.targets[row] for row in rows], IGNORED),
        )

    def prompts(self, rows: Sequence[int]) -> Tensor:
        """Build ``(B, T)`` ids of the sources alone, padded as generation needs them."""
        return self.batch(rows)[0]


def padded(texts: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Pad token ids on the right to a ``(B, T)`` tensor."""
    found = np.full((len(texts), max(map(len, texts))), fill)
    for row, ids in zip(found, texts, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(found)
