"""Decoding of decoder-only models: the embedded prompt, and steps with a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from vlpet_lightning.backbones.cached_decoder import select_rows


class PrefixStates(NamedTuple):
    """Input of the language model before the answer.

    Args:
        embedded: ``(B, S, d)`` embedded prompt with its image tokens.
        mask: ``(B, S)`` bool, true on real positions.
        positions: ``(B, S)`` positions for the rotary embedding, or ``(B, 3, S)``.
        answer: ``(B,)`` position of the first answer token.
    """

    embedded: Tensor
    mask: Tensor
    positions: Tensor
    answer: Tensor

    def positions_with(self, length: int) -> Tensor:
        """Return the positions of the sequence and of ``length`` answer tokens after it."""
        steps = torch.arange(length, device=self.answer.device)
        after = (self.answer[:, None] + steps).unflatten(0, (-1, *[1] * (self.positions.dim() - 2)))
        after = after.expand(*self.positions.shape[:-1], length)
        return torch.cat([self.positions, after], dim=-1)


class CausalSteps:
    """Decoder steps with a cache, for :func:`vlpet_lightning.beam_search.beam_search`.

    Args:
        embed: Embeds ``(R, 1)`` token ids.
        run: Computes decoder states ``(R, L, d)`` from ``(R, L, d)`` inputs, the ``(R, S)`` mask and the positions of
            the inputs, with the cache.
        states: Sequences before the answer.
        logits: Computes logits ``(R, vocabulary)`` from decoder states ``(R, d)``.
    """

    def __init__(
        self,
        embed: nn.Module,
        run: Callable[[Tensor, Tensor, Tensor, DynamicCache], Tensor],
        states: PrefixStates,
        logits: Callable[[Tensor], Tensor],
    ) -> None:
        self.embed, self.run, self.states, self.logits = embed, run, states, logits
        self.mask, self.answer = states.mask, states.answer
        self.cache = DynamicCache()  # without the config: sliding-window layers keep all positions, the mask hides them

    def __call__(self, sequences: Tensor, rows: Tensor | None, samples: Tensor | None) -> Tensor:
        """Compute the logits of the token after ``(R, t)`` sequences; see :class:`CachedDecoder`."""
        embedded = self.embed(sequences[:, -1:])
        if rows is None:  # the first step runs over the whole prompt
            embedded = torch.cat([self.states.embedded, embedded.to(self.states.embedded.dtype)], dim=1)
            positions = self.states.positions_with(1)
        else:
            select_rows(self.cache, rows)
            self.mask, self.answer = self.mask.index_select(0, rows), self.answer.index_select(0, rows)
            positions = (self.answer + sequences.shape[1] - 1)[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return self.logits(self.run(embedded, self.mask, positions, self.cache)[:, -1])
