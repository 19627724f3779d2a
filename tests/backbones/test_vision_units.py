"""Models that run their vision tower on pixels, with units inside it, against hooks on Hugging Face's forward pass."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

from tests.backbones.tiny_vlm import (
    END,
    MODELS,
    SAVED,
    TOWER,
    build,
    draw,
    library_logits,
    with_features,
    with_pixels,
)
from tests.conformance.bench import loud
from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.backbones.template import Template
from vlpet_lightning.batch import IGNORED
from vlpet_lightning.flops import sizes_of, tower_flops, training_flops
from vlpet_lightning.memory import fake_tensors, saved_for_backward
from vlpet_lightning.memory import make_batch as make_fake_batch
from vlpet_lightning.model import VLModel
from vlpet_lightning.parameters import count_parameters, placement_report
from vlpet_lightning.pet import VLPET, LargeGate, LoRA, ParallelAdapter, Placement, SmallGate

KINDS = sorted(MODELS)
SIGLIP = {"vision.attn": ("self_attn.q_proj", "self_attn.out_proj"), "vision.ffn": ("mlp.fc1", "mlp.fc2")}
ENDS = dict.fromkeys(KINDS, SIGLIP) | {
    "qwen2.5": {"vision.attn": ("attn.qkv", "attn.proj"), "vision.ffn": ("mlp.gate_proj", "mlp.down_proj")}
}
GATED = partial(VLPET, rank=4, heads=2, gate=partial(LargeGate, rank=4))
UNITS = {
    "gated": [Placement(["vision.attn", "vision.ffn"], GATED)],
    "mixed": [
        Placement("vision.attn", partial(LoRA, rank=4, dropout=0.0)),
        Placement("vision.ffn", partial(ParallelAdapter, rank=4)),
        Placement("decoder.attn", GATED, "prefix"),
    ],
}
# kinds whose tower looks up values, which fake tensors lack; the second two in transformers 5.17
READS_VALUES = {"qwen2.5"}
if "torch.where(patch_attention_mask" not in inspect.getsource(Idefics3VisionEmbeddings):
    READS_VALUES |= {"idefics3", "smolvlm"}
RULES = ("pet", "visual_embedding")


def layers_of(kind, lm):
    """Return the layers of the library's tower."""
    named = dict(lm.named_modules())
    ending = ".visual.blocks" if kind == "qwen2.5" else ".encoder.layers"
    (name,) = [name for name in named if name.endswith(ending)]
    return list(named[name])


def make(kind, name, rules=("pet",)):
    """Build a tiny model with units inside its tower, with large weights."""
    model = build(kind, UNITS[name], rules, pixels=True)
    loud(model.unit_parameters())
    return model


def hook(kind, model, plain):
    """Apply the units of a model's tower in hooks on the library's."""
    seen = []
    for place in model.injected:
        if not place.site.startswith("vision"):
            continue
        layer = layers_of(kind, plain.lm)[place.layer]
        enters, leaves = ENDS[kind][place.site]
        layer.get_submodule(enters).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        layer.get_submodule(leaves).register_forward_hook(lambda module, args, h, unit=place.unit: unit(seen.pop(), h))


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_the_library_with_the_units_in_hooks(kind, images):
    model, plain = make(kind, "gated"), build(kind)
    batch, pixels = draw(images)
    with_pixels(kind, model, batch, pixels)
    logits = model(batch)
    logits[batch.labels != IGNORED].square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.unit_parameters().items()}
    model.zero_grad()
    hook(kind, model, plain)
    for row, expected in enumerate(library_logits(kind, plain.lm, batch, pixels)):
        torch.testing.assert_close(logits[row, : len(expected)], expected, rtol=1e-4, atol=1e-4)
        expected.square().sum().backward()
    assert (logits - build(kind, pixels=True)(batch)).abs().max() > 1e-3
    for name, parameter in model.unit_parameters().items():
        largest = parameter.grad.abs().max()
        assert largest > 0
        torch.testing.assert_close(found[name] / largest, parameter.grad / largest, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_give_the_logits_and_gradients_of_stored_features(kind, images):
    stored, model = (build(kind, trainable=("visual_embedding",), pixels=pixels) for pixels in (False, True))
    batch, pixels = draw(images)
    losses = []
    for one, add in ((stored, with_features), (model, with_pixels)):
        losses.append(one.loss(add(kind, one, batch, pixels)))
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    gradients = [{n: p.grad for n, p in one.named_parameters() if p.grad is not None} for one in (stored, model)]
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_units_of_the_tower_are_counted_and_switched_off(kind):
    model = make(kind, "gated")
    layers = len(layers_of(kind, model.lm))
    groups = count_parameters(model).groups
    pair = 2 * TOWER * 4 + 4 + TOWER  # down and up, with biases
    assert groups["vision PET"].trainable == groups["vision gates"].trainable == 2 * layers * pair
    assert count_parameters(model).trainable == 4 * layers * pair
    batch, pixels = draw()
    with_pixels(kind, model, batch, pixels)
    expected = build(kind, pixels=True)(batch)
    assert not torch.allclose(model(batch), expected)
    model.enabled = False
    assert torch.equal(model(batch), expected)


@pytest.mark.parametrize("name", ["gated", "mixed", None])
@pytest.mark.parametrize("kind", KINDS)
def test_the_formula_counts_what_torch_counts(kind, name):
    model = make(kind, name).train() if name else build(kind, trainable=("visual_embedding",), pixels=True).train()
    batch, pixels = draw(2)
    with_pixels(kind, model, batch, pixels)
    batch.labels = batch.labels.clamp(min=END)  # the loss is computed for real targets only
    tokens = {"images": 2 * MODELS[kind].per_image, "source": model.mask(batch).shape[1]}
    found = training_flops(sizes_of(model), **tokens, target=batch.labels.shape[1])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss(batch).backward()
    assert len(batch) * found == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_that_runs_adds_its_forward_pass(kind):
    stored, model = (build(kind, trainable=("visual_embedding",), pixels=pixels) for pixels in (False, True))
    tokens = {"images": 2 * MODELS[kind].per_image, "source": 40, "target": 4}
    more = training_flops(sizes_of(model), **tokens) - training_flops(sizes_of(stored), **tokens)
    assert more == 2 * tower_flops(model) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_rules_that_train_the_tower_need_pixels(kind):
    with pytest.raises(ValueError, match=r"rule 'language_model' selects \d+ tensors of the vision tower, .*set image"):
        build(kind, trainable=("language_model",))


@pytest.mark.parametrize("kind", KINDS)
def test_free_sites_are_those_that_can_be_used(kind):
    for pixels in (False, True):
        found = placement_report(build(kind, pixels=pixels)).free_sites
        assert ("vision.attn" in found) is pixels
        assert "projector" in found


class Mixing(ParallelAdapter):
    """An adapter whose output depends on other positions."""

    reads_other_positions = True


def test_a_unit_that_averages_over_a_sequence_is_refused_where_it_has_those_of_several_images():
    small = partial(VLPET, rank=4, gate=SmallGate)
    for site, unit in (("vision.ffn", small), ("projector", partial(Mixing, rank=4))):
        with pytest.raises(ValueError, match=f"at site '{site}' computes a position .* other images of the batch"):
            build("qwen2.5", [Placement(site, unit)], ("pet",), pixels=True)
    assert build("smolvlm", [Placement("vision.ffn", small)], ("pet",), pixels=True).injected


def test_pixels_of_another_size_are_refused():
    model = build("smolvlm", pixels=True)
    batch, pixels = draw()
    with_pixels("smolvlm", model, batch, pixels)
    batch.features = batch.features[..., :-1]
    with pytest.raises(ValueError, match=r"pixels have shape \(3, 96, 31\), the tower reads \(96, 32\) per image"):
        model(batch)


def test_the_whole_model_can_be_trained_on_pixels():
    model = build("smolvlm", trainable=("language_model",), pixels=True)
    batch, pixels = draw()
    model.loss(with_pixels("smolvlm", model, batch, pixels)).backward()
    tower = dict(model.backbone.tower_parts(model.lm)[0].named_parameters())
    assert tower
    # a softmax does not depend on what is added to all keys
    still = [name for name, p in tower.items() if p.grad is None or p.grad.abs().max() < 1e-6]
    assert all(name.endswith("k_proj.bias") for name in still)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", sorted(set(KINDS) - READS_VALUES))
def test_fake_tensors_save_what_real_tensors_save(kind, precision):
    tiny = MODELS[kind]
    backbone = tiny.backbone.with_sizes({"pixels": True})

    def saved():
        lm = backbone.build(tiny.config)
        model = VLModel(backbone, lm, feature_dim=TOWER, placements=UNITS["mixed"], trainable=RULES).train()
        rows, width = model.visual.input_shape
        batch = make_fake_batch("vqa", 3, text=6, target=4, features=(rows,), width=width, weighted=True)
        return saved_for_backward(model, batch, gpu=False, precision=precision)

    with fake_tensors():
        found = saved()
    assert found == saved() > 0


def tiled(kind):
    """Return the description of a saved model, with its tiles, and its configuration."""
    saved = SAVED[kind]
    backbone = BACKBONES[saved.kind].with_sizes(saved.settings | {"pixels": True}).with_template(TEMPLATES[kind])
    config = saved.config(60, END, 50)
    return backbone, config


def views(count):
    return Template((3, 4), (51,), (52,), (5,), (6, 7), end=END, pad=0, between_views=((8,),) * (count - 1))


TEMPLATES = {"smolvlm tiled": views(7), "llava tiled": views(1), "llava": views(1)}


@pytest.mark.parametrize("rules", [("visual_embedding",), ("language_model",), ("pet",)])
@pytest.mark.parametrize("kind", sorted(TEMPLATES))
def test_the_formula_counts_tiles_and_layers_that_are_not_read(kind, rules):
    backbone, config = tiled(kind)
    torch.manual_seed(0)
    lm = backbone.build(config)
    placements = UNITS["gated"] if rules == ("pet",) else []
    width = backbone.feature_dim(config)
    model = VLModel(backbone, lm, feature_dim=width, placements=placements, trainable=rules).train()
    loud(model.unit_parameters())
    batch, _ = draw()
    batch.features = torch.randn(len(batch), *model.visual.input_shape)
    batch.labels = batch.labels.clamp(min=END)
    tokens = {"images": model.visual.per_image, "source": model.mask(batch).shape[1]}
    found = training_flops(sizes_of(model), **tokens, target=batch.labels.shape[1])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss(batch).backward()
    assert len(batch) * found == pytest.approx(counter.get_total_flops(), rel=0.03)
    still = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert still == []
    if kind.startswith("llava"):  # which reads the last layer but one
        assert {place.layer for place in model.injected} <= {0}
