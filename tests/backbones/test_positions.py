"""Units limited to some positions, against hooks on Hugging Face's own forward pass on pixels."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.backbones.tiny_vlm import IMAGE, MODELS, build, draw, library_inputs, save_smolvlm, with_features
from tests.conformance.bench import loud
from vlpet_lightning import VLBart, VLCausal, load_pet, save_pet
from vlpet_lightning.api import make_batch
from vlpet_lightning.batch import IGNORED
from vlpet_lightning.interop.export.merge import merge_units
from vlpet_lightning.interop.hf.adapter import adapter_tensors
from vlpet_lightning.interop.hf.hf_peft import HFPeft
from vlpet_lightning.parameters import placement_report
from vlpet_lightning.pet import IA3, VLPET, LargeGate, LoRA, MiddleXGate, ParallelAdapter, Placement, SmallGate

KINDS = sorted(MODELS)
LIMITS = ("prefix", "image")
SITES = {  # site: unit, module where x enters, module where h leaves
    "decoder.attn": (
        partial(VLPET, rank=4, heads=2, gate=partial(LargeGate, rank=4)),
        "self_attn.q_proj",
        "self_attn.o_proj",
    ),
    "decoder.attn.value": (partial(ParallelAdapter, rank=4), "self_attn.v_proj", "self_attn.v_proj"),
    "decoder.ffn": (partial(VLPET, rank=4, gate=MiddleXGate), "mlp.gate_proj", "mlp.down_proj"),
    "decoder.ffn.inner": (IA3, "mlp.down_proj", "mlp.down_proj"),
}
RULES = ("pet", "visual_embedding")


def limited(kind, positions, sites=SITES):
    """Build a tiny model whose units, with large weights, are limited to some positions."""
    placements = [Placement([site], unit, positions) for site, (unit, *_) in sites.items()]
    model = build(kind, placements, RULES)
    loud(model.unit_parameters())
    return model


def hook(layer, site, unit, chosen):
    """Register hooks that apply a unit at the ``(S,)`` chosen positions of a layer; returns their handles."""
    _, enters, leaves = (layer.get_submodule(name) if isinstance(name, str) else name for name in SITES[site])
    seen = []

    def keep(module, args):
        seen[:] = [args[0]]

    def changed(x, h):
        new = h.clone()
        new[:, chosen] = unit(x[:, chosen], h[:, chosen])
        return new

    if site.endswith("inner"):
        return [leaves.register_forward_pre_hook(lambda module, args: (changed(args[0], args[0]),))]
    after = leaves.register_forward_hook(lambda module, args, output: changed(seen[0], output))
    return [enters.register_forward_pre_hook(keep), after]


def expected_logits(kind, plain, places, positions, batch, pixels, row):
    """Return the library's logits at the answer of one sample, from pixels and without padding, with units in hooks."""
    answer = [token for token in batch.labels[row].tolist() if token != IGNORED]
    inputs, prompt = library_inputs(kind, batch.input_ids[row], pixels[row], answer[:-1])
    ids = inputs["input_ids"][0]
    chosen = torch.arange(len(ids)) < prompt if positions == "prefix" else ids == IMAGE
    layers = plain.backbone.layers(plain.lm)["decoder"]
    handles = [one for place in places for one in hook(layers[place.layer], place.site, place.unit, chosen)]
    logits = plain.lm(**inputs).logits[0, prompt - 1 :]
    for handle in handles:
        handle.remove()
    bound = MODELS[kind].softcap
    return logits if bound is None else bound * torch.tanh(logits / bound)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("positions", LIMITS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_the_library_with_units_in_hooks(kind, positions, images):
    model, plain = limited(kind, positions), build(kind)
    batch, pixels = draw(images)
    with_features(kind, model, batch, pixels)
    logits, loss = model(batch), torch.zeros(())
    for row in range(len(batch)):
        expected = expected_logits(kind, plain, model.injected, positions, batch, pixels, row)
        torch.testing.assert_close(logits[row, : len(expected)], expected, rtol=1e-4, atol=1e-4)
        loss = loss + expected.square().mean()
    loss.backward()
    theirs = {name: p.grad.clone() for name, p in model.unit_parameters().items()}
    model.zero_grad(set_to_none=True)
    real = [logits[row, : (batch.labels[row] != IGNORED).sum()] for row in range(len(batch))]
    torch.stack([one.square().mean() for one in real]).sum().backward()
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    for name, parameter in model.unit_parameters().items():
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("positions", LIMITS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_frozen_output_elsewhere_is_the_same_to_the_last_bit(kind, positions, images):
    model = limited(kind, positions, {"decoder.attn.value": SITES["decoder.attn.value"]})
    batch, pixels = draw(images)
    with_features(kind, model, batch, pixels)
    seen = []
    values = model.backbone.layers(model.lm)["decoder"][0].self_attn.v_proj
    values.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        for model.enabled in (True, False):
            model(batch)
    changed = (seen[0] != seen[1]).any(dim=-1)
    before = model.mask(batch).shape[1] + 1
    expected = torch.zeros_like(changed)
    if positions == "prefix":
        expected[:, :before] = True
    else:
        for one in model.backbone.image_slices(model.lm.config, images, 0):
            expected[:, one] = True
        assert expected[0].sum() == images * MODELS[kind].per_image
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("positions", LIMITS)
@pytest.mark.parametrize("kind", KINDS)
def test_units_without_effect_leave_the_logits_as_they_are(kind, positions):
    model = limited(kind, positions)
    model.start_as_identity()
    batch, pixels = draw()
    with_features(kind, model, batch, pixels)
    assert torch.equal(model(batch), build(kind)(batch))


@pytest.mark.parametrize("positions", LIMITS)
@pytest.mark.parametrize("kind", KINDS)
def test_units_are_called_in_the_first_step_of_generation_only(kind, positions):
    model, calls = limited(kind, positions), []
    batch, pixels = draw(2)
    with_features(kind, model, batch, pixels)
    for place in model.injected:
        place.unit.register_forward_hook(lambda module, args, output: calls.append(args[1].shape[1]))
    answers = model.generate(batch, num_beams=2, max_length=5)
    assert answers.shape[1] > 3
    expected = {"prefix": model.mask(batch).shape[1] + 1, "image": 2 * MODELS[kind].per_image}
    assert calls == [expected[positions]] * len(model.injected)
    with torch.no_grad():
        model(batch)  # units act again
    assert len(calls) == 2 * len(model.injected)


def test_a_mean_over_the_prefix_does_not_read_the_answer():
    gated = {"decoder.attn": (partial(VLPET, rank=4, gate=SmallGate),)}
    model = limited("smolvlm", "prefix", gated)
    batch, pixels = draw()
    with_features("smolvlm", model, batch, pixels)
    other = replace(batch, labels=torch.cat([batch.labels[:, :1], batch.labels[:, 1:].clamp(min=0) + 1], dim=1))
    assert torch.equal(model(batch)[:, :2], model(other)[:, :2])
    assert not torch.equal(model(batch)[:, 2:], model(other)[:, 2:])
    said = r"SmallGate at site 'decoder\.attn' computes a position from other positions, .* positions: prefix or image"
    with pytest.raises(ValueError, match=said):
        limited("smolvlm", "all", gated)


# records and refusals ----------------------------------------------------------------------------------------------

PLACEMENTS = [
    Placement("decoder.attn", SITES["decoder.attn"][0], "prefix"),
    Placement("decoder.attn.query", partial(LoRA, rank=4), "image"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_smolvlm(tmp_path_factory.mktemp("smolvlm"))


def make_module(folder, placements=PLACEMENTS):
    module = VLCausal(str(folder), placements, list(RULES))
    module.configure_model()
    return module


def test_an_export_keeps_the_positions(folder, tmp_path):
    module = make_module(folder)
    loud(module.model.unit_parameters())
    save_pet(module, tmp_path)
    assert (
        "LoRA(rank=4, alpha=32.0, dropout=0.1) at decoder.attn.query at image positions"
        in (tmp_path / "README.md").read_text()
    )
    again, batch = load_pet(tmp_path), make_batch(module, "vqa", ["what color ?"], torch.randn(1, 4, 8), ["red"])
    assert torch.equal(again(batch), module.model.eval()(batch))
    assert again.recipe == module.model.recipe
    everywhere = make_module(folder, [replace(placement, positions="all") for placement in PLACEMENTS])
    everywhere.pet_weights, everywhere.model = str(tmp_path), None
    with pytest.raises(ValueError, match=r"decoder.attn.query: LoRA with .* at image positions there, with "):
        everywhere.configure_model()
    record = json.loads((tmp_path / "pet_config.json").read_text())
    record["model"]["placements"][1]["positions"] = "text"
    (tmp_path / "pet_config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"has model.placements\[1\] .*'positions': 'text'.*: export again"):
        load_pet(tmp_path)


def test_a_checkpoint_of_other_positions_is_another_method(folder):
    checkpoint = {}
    make_module(folder).on_save_checkpoint(checkpoint)
    module = make_module(folder, [PLACEMENTS[0], replace(PLACEMENTS[1], positions="prefix")])
    said = r"decoder.attn.query: LoRA with positions=image there, with positions=prefix here"
    with pytest.raises(ValueError, match=said):
        module.on_load_checkpoint(checkpoint)


def test_reports_name_the_positions(folder):
    units = [row.unit for row in placement_report(make_module(folder)).sites]
    assert [("positions=prefix" in unit, "positions=image" in unit) for unit in units] == [(True, False), (False, True)]


def test_units_at_some_positions_are_not_merged(folder):
    module = make_module(folder, PLACEMENTS[1:])
    before = {name: tensor.clone() for name, tensor in module.model.own_state().items()}
    said = r"site 'decoder.attn.query' \(self_attn.q_proj\): LoRA cannot be merged: it acts at image positions only"
    with pytest.raises(ValueError, match=said):
        merge_units(module.model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.model.own_state().items())


def test_peft_has_no_positions(folder):
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"no format for LoRA at image positions only, as at 'decoder.attn.q"):
        adapter_tensors(make_module(folder, PLACEMENTS[1:]).model)
    settings = {"class_path": "peft.LoraConfig", "at": ["decoder.attn.query"], "positions": "prefix"}
    with pytest.raises(ValueError, match="positions is 'prefix' for peft, whose methods act at all positions: omit it"):
        HFPeft(settings)


def test_sites_without_a_choice_of_positions_refuse_it(tiny_backbone):
    said = "positions is 'prefix' in placement 0, but units at site 'encoder.ffn' act at all positions: omit it"
    with pytest.raises(ValueError, match=said):
        VLBart(str(tiny_backbone), [Placement("encoder.ffn", partial(LoRA, rank=4), "prefix")], ["pet"])


def test_unknown_positions_are_refused():
    with pytest.raises(ValueError, match="positions must be one of prefix, all, image, got 'answer'"):
        Placement("decoder.ffn", LoRA, "answer")


def test_a_limited_unit_needs_a_batch():
    unit = LoRA(8, rank=2)
    unit.limit_to("image")
    with pytest.raises(RuntimeError, match="LoRA at image positions was called without a batch: call the whole model"):
        unit.act(torch.zeros(1, 3, 8), torch.zeros(1, 3, 8))
