"""Learned prompt tokens of decoder-only models, against Hugging Face's forward pass with the same embeddings."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from tests.backbones.tiny_vlm import (
    MODELS,
    WIDTH,
    WORDS,
    build,
    check_greedy_answers,
    draw,
    library_inputs,
    save_smolvlm,
    with_features,
)
from tests.conformance.bench import checkpoint_layers, gradients, loud
from vlpet_lightning import VLCausal, load_pet, save_pet
from vlpet_lightning.api import make_batch
from vlpet_lightning.batch import IGNORED
from vlpet_lightning.flops import sizes_of, training_flops
from vlpet_lightning.pet import LoRA, ParallelAdapter, PerTask, Placement, Prompt

KINDS = sorted(MODELS)
LENGTH = 3
PROMPT = partial(Prompt, length=LENGTH, hidden=4)
RULES = ("pet", "visual_embedding")


def make(kind, unit=PROMPT, *others, rules=RULES):
    """Build a tiny model with a prompt of large weights."""
    model = build(kind, [Placement("decoder.prompt", unit), *others], rules)
    loud(model.unit_parameters())
    return model


def expected_logits(kind, plain, tokens, batch, pixels, row):
    """Return the library's logits at the answer of one sample, whose first embedded words are replaced by tokens."""
    answer = [token for token in batch.labels[row].tolist() if token != IGNORED]
    inputs, prompt = library_inputs(kind, batch.input_ids[row], pixels[row], answer[:-1])
    ids = torch.cat([torch.full((1, len(tokens)), WORDS[0]), inputs["input_ids"]], dim=1)
    prompt += len(tokens)
    inputs = {"input_ids": ids} | MODELS[kind].inputs(pixels[row], ids, prompt)

    def replaced(module, args, embedded):
        return torch.cat([tokens.expand(len(embedded), -1, -1), embedded[:, len(tokens) :]], dim=1)

    handle = plain.lm.get_input_embeddings().register_forward_hook(replaced)
    logits = plain.lm(**inputs).logits[0, prompt - 1 :]
    handle.remove()
    bound = MODELS[kind].softcap
    return logits if bound is None else bound * torch.tanh(logits / bound)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_the_library_with_the_same_embeddings(kind, images):
    model, plain = make(kind), build(kind)
    batch, pixels = draw(images)
    with_features(kind, model, batch, pixels)
    tokens = model.injected[0].unit.tokens()
    ours, theirs = model(batch), []
    assert (ours - plain(batch)).abs().max() > 1e-3
    for row in range(len(batch)):
        theirs.append(expected_logits(kind, plain, tokens, batch, pixels, row))
        torch.testing.assert_close(ours[row, : len(theirs[-1])], theirs[-1], rtol=1e-4, atol=1e-4)
    named = model.unit_parameters()
    found, expected = (
        torch.autograd.grad(sum(one.square().mean() for one in rows), list(named.values()))
        for rows in ([ours[row, : len(one)] for row, one in enumerate(theirs)], theirs)
    )
    largest = max(gradient.abs().max().item() for gradient in expected)
    for ours_of_it, theirs_of_it in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_of_it, theirs_of_it, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_trained_and_generates_as_without_a_cache(kind):
    others = [
        Placement("decoder.attn.value", partial(ParallelAdapter, rank=4), "image"),
        Placement("decoder.attn.key", partial(LoRA, rank=4, dropout=0.0), "prefix"),
    ]
    model = make(kind, PROMPT, *others)
    batch, pixels = draw(2)
    with_features(kind, model, batch, pixels)
    model.loss(batch).backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()
    }
    check_greedy_answers(model, batch)
    model.enabled = False
    assert torch.equal(model(batch), build(kind)(batch))
    assert model.mask(batch).shape == build(kind).mask(batch).shape


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_positions_of_units_are_shifted_by_the_prompt(kind, images):
    model = make(kind)
    batch, pixels = draw(images)
    with_features(kind, model, batch, pixels)
    arguments = (model.lm, model.mask(batch), model.visual.tokens(batch.features))
    shifted = model.backbone.unit_positions(*arguments, LENGTH)
    assert torch.equal(shifted["prefix"], torch.arange(model.mask(batch).shape[1] + 1))
    assert torch.equal(shifted["image"], model.backbone.unit_positions(*arguments, 0)["image"] + LENGTH)
    states = model.encode(batch)
    embedded = states.embedded[:, shifted["image"]]
    token_embedding = model.backbone.token_embedding(model.lm)
    assert torch.equal(embedded, model.visual(batch.features, None, token_embedding))


@pytest.mark.parametrize("kind", ["smolvlm", "paligemma2"])
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    model = make(kind).train()
    batch, pixels = draw()
    with_features(kind, model, batch, pixels)
    expected = gradients(model, batch)
    checkpoint_layers(model.lm)
    found = gradients(model, batch)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_each_task_may_have_a_prompt_of_its_own():
    model = make("smolvlm", partial(PerTask, unit=PROMPT, tasks=("vqa", "nlvr2")))
    for images, name in ((1, "vqa"), (2, "nlvr2")):
        batch, pixels = draw(images)
        with_features("smolvlm", model, batch, pixels)
        model.zero_grad(set_to_none=True)
        model.loss(batch).backward()
        found = {key for key, p in model.unit_parameters().items() if p.grad is not None}
        assert found
        assert all(f".{name}." in key for key in found)


def test_an_export_has_the_prompt(tmp_path):
    folder = save_smolvlm(tmp_path / "smolvlm")
    module = VLCausal(str(folder), [Placement("decoder.prompt", PROMPT)], ["pet"])
    module.configure_model()
    loud(module.model.unit_parameters())
    size = LENGTH * WIDTH + (WIDTH * 4 + 4) + (4 * WIDTH + WIDTH)
    assert sum(p.numel() for p in module.model.parameters() if p.requires_grad) == size
    save_pet(module, tmp_path / "pet")
    batch = make_batch(module, "vqa", ["what color ?"], torch.randn(1, 4, 8), ["red"])
    assert torch.equal(load_pet(tmp_path / "pet")(batch), module.model.eval()(batch))


def test_the_formula_passes_gradients_to_the_prompt():
    model, frozen = make("smolvlm", rules=("pet",)), build("smolvlm")
    frozen.requires_grad_(False)
    step = {"images": 4, "source": 20, "target": 4}
    decoder = sum(p.numel() for p in nn.ModuleList(model.layers()).parameters() if p.dim() > 1)
    more = training_flops(sizes_of(model), **step) - training_flops(sizes_of(frozen), **step)
    assert more >= 2 * decoder * 24


@pytest.mark.parametrize("site", ["decoder.ffn", "projector"])
def test_a_prompt_inside_a_layer_is_refused(site):
    with pytest.raises(ValueError, match=rf"Prompt at site '{site}' adds tokens, .* place it at "):
        build("smolvlm", [Placement(site, PROMPT)], RULES)
