"""Greedy and beam search with a model, with or without CUDA graphs."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from vlpet_lightning.batch import Batch
from vlpet_lightning.beam_search import SearchRules, beam_search
from vlpet_lightning.generation_graphs import GenerationGraphs
from vlpet_lightning.pet import Context
from vlpet_lightning.pet.side_network import Step


def search(model: Any, batch: Batch, rules: SearchRules) -> Tensor:
    """Search for the answers to a batch.

    Args:
        model: The :class:`vlpet_lightning.model.VLModel`.
        batch: ``B`` samples.
        rules: Settings of the search.

    Returns:
        Token ids, as :func:`vlpet_lightning.beam_search.beam_search` returns them.
    """
    graphs = model.generation_graphs
    if graphs is not None and not model.training and batch.input_ids.device.type == graphs.device:
        return graphs(batch, rules, model.enabled)
    return search_eagerly(model, batch, rules)


def search_eagerly(model: Any, batch: Batch, rules: SearchRules) -> Tensor:
    """Search without graphs; see :func:`search`."""
    step = decoding_steps(model, batch)
    with model.backbone.generating(model):
        return beam_search(step, len(batch), rules, batch.input_ids.device)


def decoding_steps(model: Any, batch: Batch) -> Step:
    """Encode a batch and return the decoder's steps, which run in the backbone's ``generating``."""
    states, mask = model.encode(batch), model.mask(batch)
    step = model.network.step(model.lm, states, mask, model.decoder_prefix(len(batch)), model.logits)
    return _limited_to_prompt(model, step, batch, mask) if model.limits_units else step


def graphs_of(model: Any) -> GenerationGraphs:
    """Return graphs for the searches of a model."""
    return GenerationGraphs(
        partial(decoding_steps, model),
        partial(search_eagerly, model),
        partial(model.backbone.generating, model),
        model,
        pad=model.pad_token,
        text=model.ignores_padding,
    )


def _limited_to_prompt(model: Any, step: Step, batch: Batch, mask: Tensor) -> Step:
    """Return decoder steps of which only the first applies units limited to positions before the answer."""
    later = Context(batch.task, mask if model.mask_padding else None)

    def limited(sequences: Tensor, rows: Tensor | None, samples: Tensor | None) -> Tensor:
        if rows is not None:  # tokens of the answer alone are computed
            model.hand_context(later)
        return step(sequences, rows, samples)

    return limited
