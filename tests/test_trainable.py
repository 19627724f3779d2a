"""Rules select exactly the parameters they name; an invalid rule changes nothing."""

from __future__ import annotations

import re

import pytest
from torch import nn

from tests.runs import placements, tiny_module
from vlpet_lightning.trainable import RULES, check_rules, set_trainable

LAYERS = (0, 1)


@pytest.fixture(scope="module")
def model(tiny_backbone):
    return tiny_module(tiny_backbone, placements=placements(), trainable=["visual_embedding"]).build()


def both(*names):
    """Return weight and bias of each module."""
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


def encoder(layer, *names):
    return [f"lm.model.encoder.layers.{layer}.{name}" for name in names]


def decoder(layer, *names):
    return [f"lm.model.decoder.layers.{layer}.{name}" for name in names]


ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
VLPET = ("down", "up", "gate.down", "gate.up")


def pet():
    """Parameters of VL-PET-large on both encoder sublayers and the adapter on the cross-attention value."""
    found: set[str] = set()
    for layer in LAYERS:
        for leaf in ("self_attn.out_proj", "fc2"):
            found |= both(*encoder(layer, *(f"{leaf}.unit.{part}" for part in VLPET)))
        found |= both(*decoder(layer, *(f"encoder_attn.v_proj.unit.{part}" for part in ("down", "up"))))
    return found


def encoder_norms():
    layers = [name for layer in LAYERS for name in encoder(layer, "self_attn_layer_norm", "final_layer_norm")]
    return both("lm.model.encoder.layernorm_embedding", *layers)


def decoder_norms():
    names = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
    layers = [name for layer in LAYERS for name in decoder(layer, *names)]
    return both("lm.model.decoder.layernorm_embedding", *layers)


def linears():
    attention = [f"self_attn.{leaf}" for leaf in ATTENTION]
    cross = [f"encoder_attn.{leaf}" for leaf in ATTENTION]
    found: set[str] = set()
    for layer in LAYERS:
        found |= both(*encoder(layer, *attention, "fc1", "fc2"), *decoder(layer, *attention, *cross, "fc1", "fc2"))
    return found


def visual():
    return both("visual.feature.0", "visual.feature.1", "visual.box.0", "visual.box.1") | {"visual.image_order.weight"}


def embeddings():
    stacks = {f"lm.model.{stack}.embed_positions.weight" for stack in ("encoder", "decoder")}
    return {"lm.model.shared.weight"} | stacks  # the output layer is the token embedding


def everything():
    return pet() | encoder_norms() | decoder_norms() | linears() | visual() | embeddings()


EXPECTED = {
    "decoder.layer_norm.embedding": both("lm.model.decoder.layernorm_embedding"),
    "decoder.layer_norm.attn": both(*(n for i in LAYERS for n in decoder(i, "self_attn_layer_norm"))),
    "decoder.layer_norm.cross": both(*(n for i in LAYERS for n in decoder(i, "encoder_attn_layer_norm"))),
    "decoder.layer_norm.ffn": both(*(n for i in LAYERS for n in decoder(i, "final_layer_norm"))),
    "encoder.bias": {
        name for name in everything() - visual() if name.startswith("lm.model.encoder") and "bias" in name
    },
    "decoder.bias": {
        name for name in everything() - visual() if name.startswith("lm.model.decoder") and "bias" in name
    },
    "token_embedding": {"lm.model.shared.weight"},
    "language_model": everything() - visual(),
    "pet": pet(),
    "visual_embedding": visual(),
    "encoder.layer_norm": encoder_norms(),
    "decoder.layer_norm": decoder_norms(),
    # names that contain "bias", as in the original, except for the visual embedding, which has its own rule
    "bias": {name for name in everything() - visual() if name.endswith("bias")},
    "all": everything(),
}


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("rule", EXPECTED)
def test_a_rule_trains_exactly_what_it_says(model, rule):
    report = set_trainable(model, [rule])
    assert trained(model) == EXPECTED[rule]
    assert report == {rule: sorted(EXPECTED[rule])}


def test_every_rule_is_written_out_here():
    assert set(RULES) == set(EXPECTED)


def test_rules_add_up(model):
    rules = ["pet", "visual_embedding", "encoder.layer_norm"]
    report = set_trainable(model, rules)
    assert trained(model) == pet() | visual() | encoder_norms()
    assert list(report) == rules
    assert {name for names in report.values() for name in names} == trained(model)


def test_a_rule_lists_what_it_shares_with_another(model):
    report = set_trainable(model, ["encoder.layer_norm", "bias"])
    assert trained(model) == EXPECTED["encoder.layer_norm"] | EXPECTED["bias"]
    assert set(report["encoder.layer_norm"]) & set(report["bias"]) == {
        name for name in encoder_norms() if name.endswith("bias")
    }


def test_what_no_rule_names_is_frozen_again(model):
    set_trainable(model, ["all"])
    set_trainable(model, ["decoder.layer_norm"])
    assert trained(model) == decoder_norms()


def test_without_rules_nothing_is_trained(model):
    assert set_trainable(model, []) == {}
    assert trained(model) == set()


def test_rules_may_come_from_an_iterator(model):
    set_trainable(model, iter(["pet", "visual_embedding"]))
    assert trained(model) == pet() | visual()


def test_tied_embeddings_are_trained_together(model):
    set_trainable(model, ["all"])
    assert model.lm.lm_head.weight is model.lm.model.shared.weight
    assert model.lm.lm_head.weight.requires_grad
    set_trainable(model, ["visual_embedding"])
    assert not model.lm.lm_head.weight.requires_grad


def test_norm_rules_reach_every_norm_of_the_language_model(model):
    set_trainable(model, ["encoder.layer_norm", "decoder.layer_norm"])
    norms = [module for module in model.lm.modules() if isinstance(module, nn.LayerNorm)]
    assert trained(model) == {
        name for name, p in model.named_parameters() if any(p is own for norm in norms for own in norm.parameters())
    }


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (["adapter"], ["unknown trainable rule 'adapter'", *RULES]),
        (["pet", "encoder.layernorm"], ["unknown trainable rule 'encoder.layernorm'", *RULES]),
        ([""], ["unknown trainable rule ''", *RULES]),
    ],
)
def test_an_unknown_rule_lists_the_valid_ones_and_changes_nothing(model, rules, words):
    set_trainable(model, ["decoder.layer_norm"])
    with pytest.raises(ValueError) as error:
        set_trainable(model, rules)
    assert [word for word in words if word not in str(error.value)] == []
    assert trained(model) == decoder_norms()


def test_rules_can_be_checked_without_a_model():
    check_rules(RULES)
    with pytest.raises(ValueError, match="unknown trainable rule 'norms': choose from"):
        check_rules(["all", "norms"])


def test_a_rule_that_matches_nothing_is_an_error_and_changes_nothing(tiny_backbone):
    bare = tiny_module(tiny_backbone, placements=[], trainable=["decoder.layer_norm"]).build()
    before = trained(bare)
    assert len(before) == 14
    message = "trainable rule 'pet' matches no parameter of this model: remove it, or add a placement"
    with pytest.raises(ValueError, match=re.escape(message)):
        set_trainable(bare, ["visual_embedding", "pet"])
    assert trained(bare) == before


def test_a_model_is_not_built_with_a_rule_that_matches_nothing(tiny_backbone):
    with pytest.raises(ValueError, match="trainable rule 'pet' matches no parameter"):
        tiny_module(tiny_backbone, placements=[], trainable=["pet"]).build()


def test_a_module_refuses_an_unknown_rule_before_it_loads_anything(tmp_path):
    with pytest.raises(ValueError, match="unknown trainable rule 'gates': choose from"):
        tiny_module(tmp_path / "nowhere", trainable=["gates"])
