"""Cached decoder steps in which all beams of a sample share its cross-attention keys and values.

transformers repeats the encoder's states for every beam, projects them to keys and values for every beam, and reorders
all of them in every step. Here they are projected once per sample and never reordered: the beams of a sample are the
query positions of one attention over its keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

NAME = "vlpet_beams"


def beam_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend with one query position per beam; an attention function of transformers.

    Args:
        module: The attention module.
        query: ``(R, heads, 1, width)``, one row per beam.
        key: ``(R, heads, S, width)``, or one row per sample, of which ``R`` is a multiple.
        value: As ``key``.
        attention_mask: ``(rows of key or 1, 1, 1, S)``: bool, or added to the scores.
        scaling: Factor on the scores.
        position_bias: ``(1, heads, 1, S)``, added to the scores (T5).

    Returns:
        ``(R, 1, heads, width)``, and no attention weights.
    """
    rows, heads, _length, width = query.shape
    samples = len(key)
    if rows != samples:
        query = query.view(samples, rows // samples, heads, width).transpose(1, 2)
    if position_bias is not None:
        attention_mask = position_bias if attention_mask is None else position_bias + attention_mask
    if attention_mask is not None and attention_mask.stride(-1) != 1:
        # CUDA kernels refuse other strides; contiguous() would keep them for a single key
        attention_mask = attention_mask.clone(memory_format=torch.contiguous_format)
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return found.transpose(1, 2).reshape(rows, 1, heads, width), None


AttentionInterface.register(NAME, beam_attention)


@contextmanager
def beam_attention_in(model: nn.Module) -> Iterator[None]:
    """Use :func:`beam_attention` in all layers of a model."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before: dict[int, Any] = {key: config._attn_implementation for key, config in configs.items()}  # type: ignore[union-attr]
    try:
        for config in configs.values():
            config._attn_implementation = NAME  # type: ignore[union-attr]
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]  # type: ignore[union-attr]


def token_inputs(tokens: Tensor) -> dict[str, Tensor]:
    """Return the decoder's input for ``(R, 1)`` token ids."""
    return {"input_ids": tokens}


class CachedDecoder:
    """Decoder steps for :func:`vlpet_lightning.beam_search.beam_search`; run them in :func:`beam_attention_in`.

    Args:
        decoder: The decoder.
        attention_mask: Expands a bool mask for the layers' attention.
        states: ``(B, S, width of the decoder)`` encoder states.
        mask: ``(B, S)`` bool, true on real positions.
        inputs: Returns the decoder's input, ``input_ids`` or ``inputs_embeds``, for ``(R, 1)`` token ids.
        output: Computes the result of a step, e.g. logits ``(R, vocabulary)``, from decoder states ``(R, width)``.
        prefix: Cache with ``B`` rows of keys and values that precede the decoder's tokens, or None.
    """

    def __init__(
        self,
        decoder: Any,
        attention_mask: Callable[[Tensor], Tensor],
        states: Tensor,
        mask: Tensor,
        inputs: Callable[[Tensor], Mapping[str, Tensor]],
        output: Callable[[Tensor], Tensor],
        prefix: Any = None,
    ) -> None:
        self.decoder = decoder
        self.attention_mask = attention_mask
        self.states = states
        self.mask = attention_mask(mask)
        self.inputs = inputs
        self.output = output
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if prefix is None else prefix

    def __call__(self, sequences: Tensor, rows: Tensor | None, samples: Tensor | None) -> Tensor:
        """Compute the result for the last token of ``(R, t)`` sequences, whose other tokens are in the cache.

        Args:
            sequences: Token ids.
            rows: ``(R,)`` rows of the last step that these sequences continue, or None in the first step.
            samples: Samples of the last step that remain, or None for all.
        """
        if rows is not None:
            select_rows(self.cache.self_attention_cache, rows)
        if samples is not None:
            select_rows(self.cache.cross_attention_cache, samples)
            self.states, self.mask = self.states[samples], self.mask[samples]
        length = self.cache.get_seq_length() + 1  # a token attends to all before it
        output = self.decoder(
            **self.inputs(sequences[:, -1:]),
            attention_mask=self.attention_mask(sequences.new_ones(1, 1, length, dtype=torch.bool)),
            encoder_hidden_states=self.states,
            encoder_attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = output.past_key_values
        return self.output(output.last_hidden_state[:, -1])


def select_rows(cache: Any, rows: Tensor) -> None:
    """Keep some rows of a cache, in place."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)
