"""Prompts of decoder-only models in which descriptions stand in the place of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlpet_lightning.backbones.template import Template
from vlpet_lightning.batch import IGNORED
from vlpet_lightning.pretraining.pairs import Pair, Pairs, padded
from vlpet_lightning.tasks import TASKS


class Prompts(Pairs):
    """Tokenised prompts and answers.

    Args:
        pairs: Pairs with the parts of their sources.
        tokenizer: The model's tokenizer.
        template: The model's prompt.

    Raises:
        ValueError: If a pair lacks the parts of its source.
    """

    def __init__(self, pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        self.pad = template.pad
        self._template = template
        self._tokenizer = tokenizer
        self.sources = [list(self._prompt(pair)) for pair in pairs]
        self.targets = [[*self._ids(pair.target), template.end] for pair in pairs]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _prompt(self, pair: Pair) -> Iterator[int]:
        if pair.text is None or pair.images is None:
            raise ValueError(
                f"a pair has no text and images, which the prompt of this model needs: {pair.source[:80]!r}; write the "
                "text again with `python -m vlpet_lightning data synthetic`"
            )
        template = self._template
        yield from template.before
        for image in pair.images:
            yield from (*template.image_before, *self._ids(image), *template.image_after)
        yield from template.between
        yield from self._ids(TASKS[pair.kind].instruction + pair.text)
        yield from template.after

    @property
    def longest(self) -> int:
        """Length of the longest sequence in tokens."""
        return max(len(source) + len(target) for source, target in zip(self.sources, self.targets, strict=True))

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Build right-padded ``(B, S)`` token ids of prompts and answers, and labels of the answers."""
        parts = [(self.sources[row], self.targets[row]) for row in rows]
        ids = padded([source + target for source, target in parts], self.pad)
        return ids, padded([[IGNORED] * len(source) + target for source, target in parts], IGNORED)

    def prompts(self, rows: Sequence[int]) -> Tensor:
        """Build left-padded ``(B, T)`` ids of the prompts alone."""
        longest = max(len(self.sources[row]) for row in rows)
        return torch.tensor([[self.pad] * (longest - len(self.sources[row])) + self.sources[row] for row in rows])
