"""Conversion of original checkpoints, and refused ones."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from tests.parity import Parity, parity_files, tiny_bart
from vlpet_lightning.interop import model_from_original, original_tensors
from vlpet_lightning.interop.original.names import TIED

VALUE_ADAPTER = "model.decoder.layers.0.encoder_attn.attn_value_parallel_adapter.adapters"
DOWN = "model.encoder.layers.1.attn_adapter_multihead_down"
SMALL = "--use_encoder_adapter_gating_small_xy_cat"
MIDDLE_X = "--use_encoder_adapter_gating_middle_xy_add"


@pytest.fixture(scope="module")
def large():
    (path,) = parity_files("bart-vl-pet-large.safetensors")
    return Parity(path)


@pytest.fixture(scope="module")
def small():
    (path,) = parity_files("bart-vl-pet-small.safetensors")
    return Parity(path)


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_model_comes_in_evaluation_mode_and_leaves_what_it_was_given_alone(large):
    config, weights = tiny_bart(), large.group("weight")
    before = {name: tensor.clone() for name, tensor in weights.items()}
    model = model_from_original(weights, large.flags, config)
    assert not model.training
    assert config.vocab_size == 80
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())


def test_prefixes_of_a_distributed_run_are_taken_off(large):
    weights = {f"module.{name}": tensor for name, tensor in large.group("weight").items()}
    assert same(model_from_original(weights, large.flags, tiny_bart()), large.model)


def test_a_saved_file_without_the_tied_copies_is_enough(large):
    weights = {name: tensor for name, tensor in large.group("weight").items() if name not in TIED}
    assert same(model_from_original(weights, large.flags, tiny_bart()), large.model)


@pytest.mark.parametrize("kind", ["large", "small"])
def test_weights_survive_the_way_there_and_back(kind, request, tmp_path):
    parity = request.getfixturevalue(kind)
    weights = parity.group("weight")
    back = dict(original_tensors(list(weights), parity.model.state_dict()))
    assert set(back) | (TIED & set(weights)) == set(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in back.items())
    save_file({f"module.{name}": tensor.clone() for name, tensor in back.items()}, tmp_path / "back.safetensors")
    torch.save(back, tmp_path / "back.pth")
    for saved in (load_file(tmp_path / "back.safetensors"), torch.load(tmp_path / "back.pth", weights_only=True)):
        model = model_from_original(saved, parity.flags, tiny_bart())
        assert same(model, parity.model)
        assert torch.equal(model(parity.batch()), parity.model(parity.batch()))


def test_heads_are_stacked_by_their_number(large):
    """With ten or more heads, sorting by name would put head 10 between 1 and 2."""
    weights, heads = large.group("weight"), 12
    for name in [key for key in weights if "multihead_down" in key]:
        del weights[name]
    expected = {}
    for layer in (0, 1):
        for place in ("attn", "ff"):
            stem = f"model.encoder.layers.{layer}.{place}_adapter_multihead"
            weights[f"{stem}_up.weight"] = torch.randn(32, heads)
            expected[layer, place] = torch.randn(heads, 32)
            for head in range(heads):
                weights[f"{stem}_down.{head}.weight"] = expected[layer, place][[head]]
                weights[f"{stem}_down.{head}.bias"] = torch.tensor([float(head)])
    flags = [*large.flags, "--adapter_down_dim", "12", "--encoder_adapter_multihead_num_head", "12"]
    model = model_from_original(weights, flags, tiny_bart())
    for layer, stock in enumerate(model.lm.model.encoder.layers):
        assert torch.equal(stock.self_attn.out_proj.unit.down.weight, expected[layer, "attn"])
        assert torch.equal(stock.fc2.unit.down.weight, expected[layer, "ff"])
        assert stock.fc2.unit.down.bias.tolist() == list(range(heads))


def shift(name):
    def changed(weights):
        assert name in weights
        weights[name] = weights[name] + 1

    return changed


def drop(name):
    return lambda weights: weights.pop(name)


def put(name, *shape):
    def changed(weights):
        weights[name] = torch.zeros(shape)

    return changed


REFUSED = {
    "missing": (drop("model.encoder.layers.0.fc1.weight"), r"missing: \['lm.model.encoder.layers.0.fc1.weight'\]"),
    "missing head": (drop(f"{DOWN}.2.weight"), r"layers.1.self_attn.out_proj.unit.down.weight: \(6, 32\) here, \(8"),
    "missing gate": (
        drop("model.encoder.layers.0.encoder_ff_adapter_gating_large_x_up.bias"),
        r"missing: \['lm.model.encoder.layers.0.fc2.unit.gate.up.bias'\]",
    ),
    "left over": (put("model.encoder.layers.2.fc1.weight", 64, 32), r"not of this model: .*layers.2.fc1.weight"),
    "left-over module": (put("model.encoder.lora.weight", 2), r"not of this model: \['lm.model.encoder.lora.weight'\]"),
    "shape": (
        put("model.encoder.layers.0.fc1.weight", 32, 64),
        r"fc1.weight: \(32, 64\) here, \(64, 32\) in the model that the flags mean",
    ),
    "vocabulary": (put("final_logits_bias", 1, 80), r"final_logits_bias: \(1, 80\) here, \(1, 100\) in the model"),
    "task copies": (
        shift(f"{VALUE_ADAPTER}.nlvr.up_sampler.bias"),
        rf"adapters differ from task to task: {VALUE_ADAPTER}.nlvr.up_sampler.bias is not .*caption.up_sampler.bias",
    ),
    "untied": (shift("lm_head.weight"), r"not tied to model.shared.weight in this state dict: \['lm_head.weight'\]"),
    "untied order": (
        shift("model.encoder.visual_embedding.obj_order_embedding.weight"),
        r"not tied .*obj_order_embedding.weight",
    ),
    "foreign": (lambda weights: weights.clear(), "not a state dict of the original"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_do_not_fit_are_refused(large, case):
    damage, message = REFUSED[case]
    weights = large.group("weight")
    damage(weights)
    with pytest.raises(ValueError, match=message):
        model_from_original(weights, large.flags, tiny_bart())


def test_all_that_does_not_fit_is_named_at_once(large):
    weights = large.group("weight")
    for name in ("missing", "left over", "shape"):
        REFUSED[name][0](weights)
    del weights["model.encoder.layers.1.fc1.weight"]
    with pytest.raises(ValueError, match="does not fit the model that the flags mean") as error:
        model_from_original(weights, large.flags, tiny_bart())
    words = [
        "missing: ['lm.model.encoder.layers.1.fc1.weight']",
        "not of this model: ",
        "layers.0.fc1.weight: (32, 64)",
    ]
    assert [word for word in words if word not in str(error.value)] == []


def test_weights_of_another_gate_do_not_fit(large, small):
    with pytest.raises(ValueError, match=r"missing: .*gate\.down.*not of this model: .*gate\.score"):
        model_from_original(small.group("weight"), large.flags, tiny_bart())
    other = [word for word in small.flags if word != SMALL] + [MIDDLE_X]
    with pytest.raises(ValueError, match=r"gate\.score\.weight: \(1, 64\) here, \(1, 32\) in the model"):
        model_from_original(small.group("weight"), other, tiny_bart())


def test_a_backbone_of_another_kind_is_refused(large):
    with pytest.raises(ValueError, match=r"no 'gpt2' backbone: choose from bart, t5"):
        model_from_original(large.group("weight"), large.flags, GPT2Config())


def test_flags_are_read_before_weights(large):
    with pytest.raises(ValueError, match="unknown flags of the original: --made_up"):
        model_from_original({}, [*large.flags, "--made_up"], tiny_bart())
