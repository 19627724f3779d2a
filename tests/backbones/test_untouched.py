"""An untouched backbone on text alone computes what Hugging Face's own model computes, to the last bit."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from tests.conformance import KINDS, MORE_KINDS
from tests.conformance.bench import ENGLISH, backbone_of, bare, loud, make_batch, stock
from vlpet_lightning.pet import Placement, Unit, inject
from vlpet_lightning.pet.placement import Site

ALL = (*KINDS, *MORE_KINDS)
PRE_NORM = ("mbart", "t5", "t5-v1_1")


def loud_lm(kind, attention="sdpa"):
    """Build a language model whose weights are large enough that every token matters."""
    lm = copy.deepcopy(stock(kind))
    lm.set_attn_implementation(attention)
    loud({name: parameter for name, parameter in lm.named_parameters() if parameter.dim() > 1})
    return lm


def words(kind, padded):
    batch = make_batch(kind, "gqa")
    ids = batch.input_ids if padded else batch.input_ids[:2]
    mask = ids != stock(kind).config.pad_token_id
    assert mask.all() != padded
    return ids, mask, batch.labels[: len(ids)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_states_and_logits_are_those_of_hugging_face(kind, attention, padded):
    backbone, lm = backbone_of(kind), loud_lm(kind, attention)
    ids, mask, labels = words(kind, padded)
    inputs = backbone.decoder_inputs(lm, labels)
    theirs = lm(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=inputs)
    no_images = torch.zeros(len(ids), 0, lm.config.d_model)
    states = backbone.encode(lm, ids, no_images, mask)
    assert torch.equal(states[mask], theirs.encoder_last_hidden_state[mask])
    head, bias, scale, _ = backbone.vocabulary_projection(lm)
    logits = head(backbone.decode(lm, states, mask, inputs) * scale)
    assert torch.equal(logits if bias is None else logits + bias, theirs.logits)


@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_loss_and_answers_are_those_of_hugging_face(kind):
    """Through the whole model, with image tokens that no token attends to."""
    model = bare(kind)
    batch = make_batch(kind, "gqa")
    ids, mask, labels = words(kind, True)
    batch = replace(batch, feature_mask=torch.zeros(len(ids), model.visual.tokens(batch.features), dtype=torch.bool))
    theirs = model.lm(
        input_ids=ids, attention_mask=mask.long(), decoder_input_ids=model.backbone.decoder_inputs(model.lm, labels)
    )
    torch.testing.assert_close(model(batch), theirs.logits, rtol=1e-5, atol=1e-5)
    for beams in (1,) if "t5" in kind else (1, 3):  # T5's beam search is that of transformers 4.2.1
        settings = model.backbone.generation(model.lm.config, beams, 8)
        answers = model.lm.generate(input_ids=ids, attention_mask=mask.long(), generation_config=settings)
        assert torch.equal(model.generate(batch, num_beams=beams, max_length=8), answers)


class Watch(Unit):
    """Keeps its inputs."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, x, h):
        self.seen = (x.detach(), h.detach())
        return h


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("kind", PRE_NORM)
@torch.no_grad()
def test_a_unit_of_a_pre_norm_model_reads_the_residual_stream(kind, stack):
    """The stream enters each sublayer, and the sum of both enters the next."""
    backbone, lm = backbone_of(kind), loud_lm(kind)
    sublayers = [f"{stack}.{name}" for name in ("attn", "cross", "ffn") if f"{stack}.{name}" in backbone.sites]
    places = inject(backbone.layers(lm), backbone.sites, [Placement(sublayers, Watch)])
    ids, mask, labels = words(kind, True)
    lm(input_ids=ids, attention_mask=mask.long(), labels=labels)
    seen = {(place.layer, place.site): place.unit.seen for place in places}
    ordered = [seen[layer, site] for layer in range(2) for site in sublayers]
    assert len(ordered) == len(seen) == 2 * len(sublayers)
    for (x, h), (following, _) in pairwise(ordered):
        torch.testing.assert_close(following, x + h, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ALL)
def test_every_site_leaves_at_a_linear_layer_of_every_layer(kind):
    backbone, lm = backbone_of(kind), stock(kind)
    for site in backbone.sites.values():
        if isinstance(site, Site):
            for layer in backbone.layers(lm)[site.stack]:
                names = dict(layer.named_modules())
                assert site.enters in names
                assert all(isinstance(names[name], nn.Linear) for name in filter(None, (site.leaves, site.also)))


def test_mbart_starts_its_answers_with_the_language():
    model, batch = bare("mbart"), make_batch("mbart", "gqa")
    start = [model.lm.config.decoder_start_token_id, ENGLISH]
    assert model.backbone.answer_prefix(model.lm.config) == start
    for beams in (1, 3):
        assert model.generate(batch, num_beams=beams, max_length=6)[:, :2].tolist() == [start] * len(batch)
