"""Units at the output of the projector, against hooks on Hugging Face's own forward pass on pixels."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from tests.backbones.tiny_vlm import MODELS, TOWER, WIDTH, build, draw, library_logits, save_smolvlm, with_features
from tests.conformance.bench import loud
from vlpet_lightning import VLCausal, load_pet, save_pet
from vlpet_lightning.api import make_batch
from vlpet_lightning.interop.export.merge import merge_units
from vlpet_lightning.interop.hf.adapter import adapter_tensors
from vlpet_lightning.interop.hf.hf_peft import HFPeft
from vlpet_lightning.parameters import count_parameters
from vlpet_lightning.pet import (
    VLPET,
    Adapter,
    HyperFormer,
    LargeGate,
    LoRA,
    ParallelAdapter,
    PerTask,
    Placement,
)

KINDS = sorted(MODELS)
ENDS = {  # first and last linear layer of the projector, and number of features in the input of the first
    "idefics3": ("modality_projection.proj", "modality_projection.proj", 4 * TOWER),
    "llava": ("linear_1", "linear_2", TOWER),
    "paligemma": ("linear", "linear", TOWER),
    "paligemma2": ("linear", "linear", TOWER),
    "qwen2.5": ("mlp.0", "mlp.2", 4 * TOWER),
    "smolvlm": ("modality_projection.proj", "modality_projection.proj", 4 * TOWER),
}
SINGLE = [kind for kind, (enters, leaves, _) in ENDS.items() if enters == leaves]
UNITS = {
    "lora": (partial(LoRA, rank=4, dropout=0.0), lambda width: 4 * (width + WIDTH)),
    "parallel": (partial(ParallelAdapter, rank=4), lambda width: 4 * (width + WIDTH) + 4 + WIDTH),
    "sequential": (partial(Adapter, rank=4), lambda width: 2 * 4 * WIDTH + 4 + WIDTH),
    "per task": (
        partial(PerTask, unit=partial(Adapter, rank=4), tasks=("vqa", "nlvr2")),
        lambda width: 2 * (2 * 4 * WIDTH + 4 + WIDTH),
    ),
}
RULES = ("pet", "visual_embedding")


def make(kind, name, rules=RULES):
    """Build a tiny model with a unit at its projector, with large weights."""
    model = build(kind, [Placement("projector", UNITS[name][0])], rules)
    loud(model.unit_parameters())
    return model


@pytest.mark.parametrize(("name", "images"), [("lora", 1), ("per task", 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_library_with_the_unit_in_a_hook(kind, name, images):
    model, plain = make(kind, name), build(kind)
    unit = model.injected[0].unit
    batch, pixels = draw(images)
    with_features(kind, model, batch, pixels)
    enters, leaves, _ = ENDS[kind]
    seen, projector = [], plain.backbone.projector(plain.lm)
    projector.get_submodule(enters).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    projector.get_submodule(leaves).register_forward_hook(lambda module, args, h: unit(seen.pop(), h))
    with torch.no_grad():
        logits = model(batch)
        assert (logits - build(kind)(batch)).abs().max() > 1e-3
        for row, expected in enumerate(library_logits(kind, plain.lm, batch, pixels)):
            torch.testing.assert_close(logits[row, : len(expected)], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_unit_is_trained_counted_and_switched_off(kind, name):
    model = make(kind, name, ("pet",))
    _, _, width = ENDS[kind]
    size = UNITS[name][1](width)
    assert count_parameters(model).groups["projector PET"].trainable == size
    assert count_parameters(model).trainable == size
    batch, pixels = draw(2)
    with_features(kind, model, batch, pixels)
    model.loss(batch).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    used = {key for key in model.unit_parameters() if ".vqa." not in key}
    assert set(found) == used
    assert all(gradient.any() for gradient in found.values())
    model.start_as_identity()
    expected = build(kind)(batch)
    assert torch.equal(model(batch), expected)
    loud(model.unit_parameters())
    model.enabled = False
    assert torch.equal(model(batch), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rule_of_the_projector_leaves_the_unit_out(kind):
    rules = make(kind, "lora").trainable
    assert not set(rules["pet"]) & set(rules["visual_embedding"])
    assert len(rules["pet"]) == 2
    assert rules["visual_embedding"] == build(kind, trainable=("visual_embedding",)).trainable["visual_embedding"]


@pytest.mark.parametrize("kind", KINDS)
def test_units_that_do_not_fit_are_refused_by_name(kind):
    gated = partial(VLPET, rank=4, gate=partial(LargeGate, rank=4))
    width = ENDS[kind][2]
    said = rf"'projector' has {width} channels where x enters and {WIDTH} where h leaves: VLPET needs equal widths"
    with pytest.raises(ValueError, match=said):
        build(kind, [Placement("projector", gated)], RULES)
    with pytest.raises(ValueError, match=r"units at site 'projector' act at all positions"):
        build(kind, [Placement("projector", partial(LoRA, rank=4), "image")], RULES)
    with pytest.raises(ValueError, match=r"site 'projector' has .*: HyperFormer needs equal widths"):
        build(kind, [Placement("projector", partial(HyperFormer, tasks=["vqa"]))], RULES)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_of_peft_computes_what_ours_computes_or_is_refused(kind):
    pytest.importorskip("peft")
    settings = {"class_path": "peft.LoraConfig", "at": ["projector"], "init_args": {"r": 4, "lora_alpha": 32}}
    if kind not in SINGLE:
        with pytest.raises(ValueError, match="site 'projector' is not a single linear layer, which peft needs"):
            build(kind, None, RULES, HFPeft(settings))
        return
    ours, theirs = make(kind, "lora"), build(kind, None, RULES, HFPeft(settings))
    named = {name.replace(".default.", "."): p for name, p in theirs.unit_parameters().items()}
    with torch.no_grad():
        for name, parameter in ours.unit_parameters().items():
            named[name.replace(".unit.", ".")].copy_(parameter)
    assert len(theirs.trainable["pet"]) == 2
    assert not set(theirs.trainable["pet"]) & set(theirs.trainable["visual_embedding"])
    batch, pixels = draw()
    with_features(kind, ours, batch, pixels)
    torch.testing.assert_close(theirs(batch), ours(batch))
    frozen = make(kind, "lora", ("pet",))
    assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name in adapter_tensors(frozen)} == {
        ENDS[kind][0].rpartition(".")[2]
    }


@pytest.mark.parametrize("kind", KINDS)
def test_lora_is_merged_where_it_reads_the_input_of_its_layer(kind):
    model = make(kind, "lora")
    batch, pixels = draw()
    with_features(kind, model, batch, pixels)
    expected = model(batch)
    if kind not in SINGLE:
        with pytest.raises(ValueError, match=r"layer 0, site 'projector' .*: LoRA cannot be merged: there it reads"):
            merge_units(model)
        return
    merge_units(model)
    assert not any(isinstance(module, LoRA) for module in model.modules())
    torch.testing.assert_close(model(batch), expected, rtol=1e-4, atol=1e-4)


def test_the_digest_of_a_tower_is_without_its_projector():
    digests = []
    for std in (0.1, 0.2):
        model = make("qwen2.5", "lora")
        with torch.no_grad():
            for parameter in model.backbone.projector(model.lm).parameters():
                nn.init.normal_(parameter, std=std)
        digests.append(model.backbone.tower_fingerprint(model.lm))
    assert digests[0] == digests[1] == build("qwen2.5").backbone.tower_fingerprint(build("qwen2.5").lm)


def test_an_export_has_the_unit(tmp_path):
    folder = save_smolvlm(tmp_path / "smolvlm")
    module = VLCausal(str(folder), [Placement("projector", UNITS["lora"][0])], ["pet"])
    module.configure_model()
    loud(module.model.unit_parameters())
    save_pet(module, tmp_path / "pet")
    batch = make_batch(module, "vqa", ["what color ?"], torch.randn(1, 4, 8), ["red"])
    assert torch.equal(load_pet(tmp_path / "pet")(batch), module.model.eval()(batch))
