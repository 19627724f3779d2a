"""Decoding of decoder-only models: the embedded prompt, and steps with a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vlpet_lightning.backbones.cached_decoder import select_rows

if TYPE_CHECKING:
    from vlpet_lightning.backbones.causal import CausalBackbone


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
        backbone: Description of the model.
        lm: The model.
        states: Sequences before the answer.
        logits: Computes logits ``(R, vocabulary)`` from decoder states ``(R, d)``.
    """

    def __init__(
        self, backbone: CausalBackbone, lm: Any, states: PrefixStates, logits: Callable[[Tensor], Tensor]
    ) -> None:
        self.backbone, self.lm, self.logits = backbone, lm, logits
        self.states = states
        self.mask = states.mask
        self.answer = states.answer
        self.prompt = states.embedded.shape[1] + 1
        self.cache = DynamicCache()  # without the config: sliding-window layers keep all positions, the mask hides them

    def __call__(self, sequences: Tensor, rows: Tensor | None, samples: Tensor | None) -> Tensor:
        """Compute the logits of the token after ``(R, t)`` sequences; see :class:`CachedDecoder`."""
        embedded = self.backbone.stack(self.lm, "decoder").embed_tokens(sequences[:, -1:])
        if rows is None:  # the first step runs over the whole prompt
            embedded = torch.cat([self.states.embedded, embedded.to(self.states.embedded.dtype)], dim=1)
            positions = self.states.positions_with(1)
        else:
            select_rows(self.cache, rows)
            self.mask, self.answer = self.mask.index_select(0, rows), self.answer.index_select(0, rows)
            positions = (self.answer + sequences.shape[1] - 1)[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        found = self.backbone._run(self.lm, embedded, self.mask, positions, self.prompt, self.cache)
        return self.logits(found.last_hidden_state[:, -1])
