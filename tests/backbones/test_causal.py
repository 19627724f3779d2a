"""Decoder-only models against Hugging Face's own forward pass and generation, on pixels."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.backbones.tiny_vlm import (
    END,
    MODELS,
    PAD,
    TOWER,
    VALUES,
    WIDTH,
    build,
    check_greedy_answers,
    draw,
    library_inputs,
    with_features,
)
from vlpet_lightning.answers import sequence_probabilities
from vlpet_lightning.batch import IGNORED
from vlpet_lightning.flops import sizes_of, training_flops
from vlpet_lightning.interop.hf.hf_peft import HFPeft
from vlpet_lightning.pet import (
    IA3,
    VLPET,
    Adapter,
    DoRA,
    LadderSideNetwork,
    LargeGate,
    LoRA,
    ParallelAdapter,
    Placement,
)

KINDS = sorted(MODELS)


def answer_of(batch, row):
    return [token for token in batch.labels[row].tolist() if token != IGNORED]


def expected_logits(kind, model, batch, pixels, row):
    """Return the library's logits at the answer of one sample, from pixels and without padding."""
    inputs, prompt = library_inputs(kind, batch.input_ids[row], pixels[row], answer_of(batch, row)[:-1])
    logits = model.lm(**inputs).logits[0, prompt - 1 :]
    bound = MODELS[kind].softcap
    return logits if bound is None else bound * torch.tanh(logits / bound)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(("kind", "attention"), [(kind, name) for kind in KINDS for name in MODELS[kind].attentions])
def test_logits_from_features_are_those_of_the_whole_model_on_pixels(kind, images, attention):
    model = build(kind)
    model.lm.set_attn_implementation(attention)
    batch, pixels = draw(images)
    with torch.no_grad():
        logits = model(with_features(kind, model, batch, pixels))
        expected_rows = [expected_logits(kind, model, batch, pixels, row) for row in range(len(batch))]
    for row, expected in enumerate(expected_rows):
        torch.testing.assert_close(logits[row, : len(expected)], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_those_of_the_library(kind, images):
    model = build(kind)
    batch, pixels = draw(images)
    with_features(kind, model, batch, pixels)
    seen = []
    rotary = model.backbone.stack(model.lm, "decoder").rotary_emb
    rotary.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args + tuple(kwargs.values()))[-1]), with_kwargs=True
    )
    with torch.no_grad():
        model(batch)
        for row in range(len(batch)):
            expected_logits(kind, model, batch, pixels, row)
    answers = batch.labels != IGNORED
    real = torch.cat([model.mask(batch), answers], dim=1)
    for row, expected in enumerate(seen[1:]):
        assert torch.equal(seen[0][..., row, real[row]], expected.squeeze(-2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradients_are_those_of_the_whole_model(kind):
    model = build(kind)
    batch, pixels = draw()
    with_features(kind, model, batch, pixels)
    model.loss(batch).backward()
    ours = {name: p.grad.clone() for name, p in model.lm.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    losses = []
    for row in range(len(batch)):
        logits = expected_logits(kind, model, batch, pixels, row)
        answer = torch.tensor(answer_of(batch, row))
        losses.append(torch.nn.functional.cross_entropy(logits, answer))  # VQA: mean over samples
    torch.stack(losses).mean().backward()
    theirs = {name: p.grad for name, p in model.lm.named_parameters() if p.grad is not None}
    outside_the_tower = (MODELS[kind].backbone.text_path, *MODELS[kind].projector, "lm_head")
    assert set(ours) == {name for name in theirs if name.startswith(outside_the_tower)}
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("beams", "images"), [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_generated_tokens_are_those_of_the_library(kind, beams, images):
    model = build(kind)
    if beams > 1 < images and not hasattr(model.lm, "_expand_multimodal_outputs"):  # transformers 5.17
        pytest.skip("this version of transformers gives a beam the images of another one")
    if beams > 1 and MODELS[kind].softcap is not None:
        pytest.skip("this version of transformers leaves out the bound of the logits, and with it the order of beams")
    batch, pixels = draw(images)
    if beams > 1:  # with beams that end, the library keeps other hypotheses (docs/differences.md)
        model.lm.lm_head.weight.data[END] = 0
    ours = model.generate(with_features(kind, model, batch, pixels), num_beams=beams, max_length=8)
    if beams == 1:
        with torch.no_grad():  # an answer ends where the first one has its third token
            model.lm.lm_head.weight[END] = 1.05 * model.lm.lm_head.weight[ours[0, 3]]
        ours = model.generate(batch, num_beams=1, max_length=8)
    ended = []
    for row in range(len(batch)):
        inputs, prompt = library_inputs(kind, batch.input_ids[row], pixels[row], [])
        found = model.lm.generate(
            **inputs,
            attention_mask=torch.ones_like(inputs["input_ids"]),
            max_new_tokens=7,
            max_length=None,
            num_beams=beams,
            do_sample=False,
            early_stopping=False,
            eos_token_id=END,
            pad_token_id=PAD,
        )[0, prompt:]
        answer = ours[row, 1 : 1 + len(found)]
        assert torch.equal(answer, found)
        assert set(ours[row, 1 + len(found) :].tolist()) <= {PAD}
        ended.append(END in answer.tolist())
    assert any(ended) == (beams == 1)


@pytest.mark.parametrize("kind", KINDS)
def test_several_answers_have_the_probability_of_their_tokens(kind):
    model = build(kind)
    batch, pixels = draw()
    with_features(kind, model, batch, pixels)
    ids = model.generate(batch, num_beams=3, max_length=6, answers=2)
    found = sequence_probabilities(model, batch, ids)
    for row in range(len(ids)):
        one = replace(batch, input_ids=batch.input_ids[row // 2][None], features=batch.features[row // 2][None])
        torch.testing.assert_close(found[row], sequence_probabilities(model, one, ids[row : row + 1])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_lora_of_peft_at_our_sites_computes_what_ours_computes(kind):
    pytest.importorskip("peft")
    sites = ["decoder.attn.query", "decoder.attn.value"]
    ours = build(kind, [Placement(sites, LoRA.with_(rank=4, alpha=8))], ("pet", "visual_embedding"))
    settings = {"class_path": "peft.LoraConfig", "at": sites, "init_args": {"r": 4, "lora_alpha": 8}}
    theirs = build(kind, None, ("pet", "visual_embedding"), HFPeft(settings))
    named = {name.replace(".default.", "."): p for name, p in theirs.unit_parameters().items()}
    units = {name.replace(".unit.", "."): p for name, p in ours.unit_parameters().items()}
    assert units.keys() == named.keys()
    with torch.no_grad():
        for name, parameter in units.items():
            parameter.normal_(std=0.2)
            named[name].copy_(parameter)
    batch, pixels = draw()
    with_features(kind, ours, batch, pixels)
    for model in (ours, theirs):
        model.loss(batch).mean().backward()
    torch.testing.assert_close(theirs(batch), ours(batch))
    assert (ours(batch) - build(kind)(batch)).abs().max() > 1e-3
    for name, parameter in units.items():
        torch.testing.assert_close(named[name].grad, parameter.grad)


@pytest.mark.parametrize("rule", ["bias", "language_model", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_rules_that_select_the_tower_are_refused(kind, rule):
    with pytest.raises(ValueError, match=f"trainable rule '{rule}' selects .* tensors of the vision tower"):
        build(kind, trainable=(rule,))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_the_end_of_the_text_change_nothing(kind):
    model = build(kind)
    batch, pixels = draw()
    with_features(kind, model, batch, pixels)
    longer = copy.copy(batch)
    longer.input_ids = torch.nn.functional.pad(batch.input_ids, (0, 3), value=PAD)
    with torch.no_grad():
        torch.testing.assert_close(model(longer), model(batch), rtol=1e-5, atol=1e-5)


# units ---------------------------------------------------------------------------------------------------------------

UNITS = {
    "lora": Placement(["decoder.attn.query", "decoder.attn.value"], partial(LoRA, rank=4)),
    "dora": Placement(["decoder.attn.key", "decoder.attn.value"], partial(DoRA, rank=4)),
    "ia3": Placement(["decoder.attn.key", "decoder.attn.value", "decoder.ffn.inner"], IA3),
    "parallel adapter": Placement(["decoder.attn.value"], partial(ParallelAdapter, rank=4)),
    "sequential adapter": Placement(["decoder.attn.value", "decoder.ffn"], partial(Adapter, rank=4)),
    "vlpet": Placement(
        ["decoder.attn", "decoder.ffn"], partial(VLPET, rank=4, heads=2, gate=partial(LargeGate, rank=4))
    ),
    "vlpet before the answer": Placement(
        ["decoder.attn", "decoder.ffn"],
        partial(VLPET, rank=4, heads=2, gate=partial(LargeGate, rank=4)),
        positions="prefix",
    ),
    "lora at images": Placement(
        ["decoder.attn.key", "decoder.attn.value"], partial(LoRA, rank=4, dropout=0.0), positions="image"
    ),
}
SIZES = {  # per layer
    "lora": (WIDTH * 4 + 4 * WIDTH) + (WIDTH * 4 + 4 * VALUES),
    "dora": 2 * (WIDTH * 4 + 4 * VALUES + VALUES),
    "ia3": 2 * VALUES + 48,
    "parallel adapter": WIDTH * 4 + 4 + 4 * VALUES + VALUES,
    "sequential adapter": (2 * VALUES * 4 + 4 + VALUES) + (2 * WIDTH * 4 + 4 + WIDTH),
    "vlpet": 2 * 2 * (2 * WIDTH * 4 + 4 + WIDTH),
}
SIZES |= {"vlpet before the answer": SIZES["vlpet"], "lora at images": 2 * (WIDTH * 4 + 4 * VALUES)}


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("kind", KINDS)
def test_units_train_and_generate_as_without_a_cache(kind, name):
    model = build(kind, [UNITS[name]], ("pet", "visual_embedding"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.unit_parameters().values():
            parameter.normal_(std=0.3, generator=generator)
    assert sum(p.numel() for p in model.unit_parameters().values()) == 2 * SIZES[name]
    batch, pixels = draw()
    with_features(kind, model, batch, pixels)
    model.train()
    model.loss(batch).backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    projector = {name for name in trained if name.startswith("lm.")} - set(model.unit_parameters())
    assert projector == {
        f"lm.{name}" for name, _ in model.lm.named_parameters() if name.startswith(MODELS[kind].projector)
    }
    assert set(model.own_state()) == trained
    model.eval()
    check_greedy_answers(model, batch)
    before = model(batch)
    model.enabled = False
    assert torch.equal(model(batch), build(kind)(batch))
    model.enabled = True
    assert torch.equal(model(batch), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_unit_that_needs_equal_widths_is_refused_at_grouped_values(kind):
    placement = Placement(["decoder.attn.value"], partial(VLPET, rank=4, gate=partial(LargeGate, rank=4)))
    with pytest.raises(ValueError, match=f"has {WIDTH} channels where x enters and {VALUES} where h leaves: VLPET nee"):
        build(kind, [placement])


@pytest.mark.parametrize("kind", KINDS)
def test_sites_and_rules_of_an_encoder_are_refused(kind):
    with pytest.raises(ValueError, match=r"unknown site 'encoder\.attn' in placement 0: choose from decoder\.attn, "):
        build(kind, [Placement("encoder.attn", LoRA)])
    with pytest.raises(ValueError, match=r"site 'side' cannot be used: a side network has layers beside .* one stack;"):
        build(kind, [Placement("side", LadderSideNetwork)])
    with pytest.raises(ValueError, match=r"trainable rule 'encoder\.layer_norm' matches no parameter"):
        build(kind, trainable=("encoder.layer_norm",))


@pytest.mark.parametrize("site", ["vision.attn", "vision.ffn"])
@pytest.mark.parametrize("kind", KINDS)
def test_units_in_the_tower_are_refused_with_the_reason(kind, site):
    said = rf"^site '{site}' cannot be used: the vision tower does not run .*; set image_input of VLCausal to pixels"
    with pytest.raises(ValueError, match=said):
        build(kind, [Placement(site, LoRA)])


@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_the_decoder_can_be_trained(kind):
    model = build(kind, trainable=("decoder.layer_norm",))
    found = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found == MODELS[kind].norms * WIDTH


@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_the_decoder_belong_to_its_sublayers(kind):
    trained = {}
    for place in ("attn", "ffn"):
        model = build(kind, trainable=(f"decoder.layer_norm.{place}",))
        trained[place] = {name for name, p in model.named_parameters() if p.requires_grad}
        assert len(trained[place]) == (MODELS[kind].norms - 1) / 2
    assert not trained["attn"] & trained["ffn"]
    assert not any("feedforward" in name for name in trained["attn"])
    with pytest.raises(ValueError, match=r"trainable rule 'decoder\.layer_norm\.cross' matches no parameter"):
        build(kind, trainable=("decoder.layer_norm.cross",))


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_another_tower_are_refused(kind):
    model = build(kind)
    batch, pixels = draw()
    with_features(kind, model, batch, pixels)
    batch.features = batch.features[:, :-1]
    with pytest.raises(
        ValueError, match=f"the projector reads {model.visual.vectors} vectors of dimension {TOWER} per image"
    ):
        model(batch)


@pytest.mark.parametrize("name", ["lora", "vlpet", "vlpet before the answer", "lora at images", None])
@pytest.mark.parametrize("kind", KINDS)
def test_the_formula_counts_what_torch_counts(kind, name):
    placements, rules = ([UNITS[name]], ("pet", "visual_embedding")) if name else ([], ())
    model = build(kind, placements, rules).train()
    batch, pixels = draw(samples=2)
    with_features(kind, model, batch, pixels)
    batch.labels = batch.labels.clamp(min=END)  # the loss is computed for real targets only
    source = model.mask(batch).shape[1]
    found = training_flops(sizes_of(model), images=MODELS[kind].per_image, source=source, target=batch.labels.shape[1])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss(batch).backward()
    assert len(batch) * found == pytest.approx(counter.get_total_flops(), rel=0.02)
