"""Injection of units: unchanged backbone, positions of units, and refusals."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from tests.parity import tiny_bart
from tests.runs import placements, tiny_module
from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.model import VLModel
from vlpet_lightning.pet import (
    VLPET,
    ParallelAdapter,
    PerTask,
    Placement,
    Prompt,
    Site,
    Unit,
    UnitLinear,
    check_placements,
    inject,
)

BART = BACKBONES["bart"]
ADAPTER = partial(ParallelAdapter, rank=4)
SITES = {name: site for name, site in BART.sites.items() if isinstance(site, Site)}  # those inside layers
BEHIND = {name: site for name, site in SITES.items() if site.side == "output"}


def put(lm, *placements):
    return inject(BART.layers(lm), BART.sites, placements)


# what stays as it was -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
def test_no_key_of_the_backbone_moves_at_any_site(site):
    lm = BART.build(tiny_bart())
    before = lm.state_dict(keep_vars=True)
    put(lm, Placement([site], ADAPTER))
    after = lm.state_dict(keep_vars=True)
    name = "unit" if SITES[site].side == "output" else "input_unit"
    leaves = [f"{leaf}.{name}." for leaf in (SITES[site].leaves, SITES[site].also) if leaf]
    added = {key for key in after if any(leaf in key for leaf in leaves)}
    assert list(before) == [key for key in after if key not in added]
    assert {key for key in after if key not in before} == added != set()
    assert all(after[key] is tensor for key, tensor in before.items())


def test_a_pretrained_state_dict_loads_into_an_injected_model():
    pretrained, lm = BART.build(tiny_bart()), BART.build(tiny_bart())
    put(lm, *placements())
    result = lm.load_state_dict(pretrained.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert all(".unit." in key for key in result.missing_keys)
    assert torch.equal(lm.model.encoder.layers[1].fc2.weight, pretrained.model.encoder.layers[1].fc2.weight)


def test_replaced_layers_keep_their_kind_and_mode():
    lm = BART.build(tiny_bart()).eval()
    put(lm, Placement(["encoder.ffn"], ADAPTER))
    host = lm.model.encoder.layers[0].fc2
    assert isinstance(host, UnitLinear)
    assert isinstance(host, nn.Linear)
    assert not host.training
    assert (host.in_features, host.out_features) == (64, 32)


def test_a_layer_without_a_bias_is_taken_as_it_is():
    layer = nn.ModuleDict({"up": nn.Linear(6, 6, bias=False)})
    ((place),) = inject({"encoder": [layer]}, {"up": Site("encoder", "up", "up")}, [Placement(["up"], ADAPTER)])
    x = torch.randn(2, 6)
    assert layer["up"].bias is None
    assert torch.equal(layer["up"](x), place.unit(x, x @ layer["up"].weight.T))


# where units go -------------------------------------------------------------------------------------------------------


def test_every_layer_of_a_site_gets_a_unit_of_its_own_in_the_order_of_the_placements():
    lm = BART.build(tiny_bart())
    places = put(
        lm,
        Placement(["decoder.cross.value", "encoder.ffn"], ADAPTER),
        Placement(["encoder.attn"], partial(VLPET, rank=8)),
    )
    sites = ["decoder.cross.value"] * 2 + ["encoder.ffn"] * 2 + ["encoder.attn"] * 2
    assert [(place.site, place.layer) for place in places] == list(zip(sites, [0, 1] * 3, strict=True))
    assert len({id(p) for place in places for p in place.unit.parameters()}) == sum(
        len(list(place.unit.parameters())) for place in places
    )
    assert lm.model.decoder.layers[1].encoder_attn.v_proj.unit is places[1].unit


@pytest.mark.parametrize("site", BEHIND)
def test_a_unit_gets_what_enters_and_what_leaves_its_sublayer(site):
    seen = []

    class Spy(Unit):
        def __init__(self, width):
            super().__init__()

        def forward(self, x, h):
            seen.append((x, h))
            return h

    lm = BART.build(tiny_bart()).eval()
    spot = BART.sites[site]
    layer = BART.layers(lm)[spot.stack][0]
    entered, left = [], []
    layer.get_submodule(spot.enters).register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    ids = torch.tensor([[0, 7, 8, 2], [0, 9, 2, 1]])
    layer.get_submodule(spot.leaves).register_forward_hook(lambda module, args, output: left.append(output))
    expected = lm(input_ids=ids, labels=ids).logits
    (x,), (h,) = entered, left
    put(lm, Placement([site], Spy))
    assert torch.equal(lm(input_ids=ids, labels=ids).logits, expected)
    assert torch.equal(seen[0][0], x)
    assert torch.equal(seen[0][1], h)


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ([Placement(["encoder.fnn"], ADAPTER)], ["'encoder.fnn' in placement 0", *BART.sites]),
        ([Placement(["encoder.ffn"], ADAPTER), Placement([], ADAPTER)], ["placement 1 names no site", *BART.sites]),
        (
            [Placement(["encoder.ffn", "encoder.ffn"], ADAPTER)],
            ["two units at site 'encoder.ffn'", "placements 0 and 0"],
        ),
        (
            [Placement(["encoder.ffn"], ADAPTER), Placement(["encoder.attn", "encoder.ffn"], partial(VLPET, rank=8))],
            ["two units at site 'encoder.ffn'", "placements 0 and 1", "one unit a site"],
        ),
    ],
)
def test_placements_that_cannot_be_are_refused_before_anything_is_changed(wanted, words):
    lm = BART.build(tiny_bart())
    before = dict(lm.named_modules())
    with pytest.raises(ValueError) as error:
        put(lm, *wanted)
    assert [word for word in words if word not in str(error.value)] == []
    after = dict(lm.named_modules())
    assert list(after) == list(before)
    assert all(after[name] is module for name, module in before.items())
    assert not any(module._forward_pre_hooks for module in lm.modules())


def test_a_second_injection_at_a_site_is_refused():
    lm = BART.build(tiny_bart())
    put(lm, Placement(["encoder.ffn"], ADAPTER))
    before = list(lm.state_dict())
    with pytest.raises(ValueError, match=r"two units at site 'encoder\.ffn': ParallelAdapter is already there"):
        put(lm, Placement(["encoder.ffn"], partial(VLPET, rank=8)))
    assert list(lm.state_dict()) == before


def test_a_unit_that_cannot_be_made_changes_nothing():
    lm = BART.build(tiny_bart())
    before = list(lm.state_dict())
    with pytest.raises(ValueError, match="rank 6 is not divisible by heads 4"):
        put(lm, Placement(["encoder.ffn"], ADAPTER), Placement(["encoder.attn"], partial(VLPET, rank=6)))
    assert list(lm.state_dict()) == before


def test_a_prompt_belongs_in_front_of_a_stack_and_nothing_else_does(tiny_backbone):
    prompt = partial(Prompt, length=2, hidden=4)
    for unit in (prompt, partial(PerTask, unit=prompt, tasks=["vqa"])):
        with pytest.raises(ValueError, match=r"at site 'encoder\.ffn' adds tokens.*place it at encoder\.prompt"):
            put(BART.build(tiny_bart()), Placement(["encoder.ffn"], unit))
    with pytest.raises(ValueError, match=r"ParallelAdapter at site 'encoder\.prompt' adds no tokens: place a Prompt"):
        tiny_module(tiny_backbone, placements=[Placement(["encoder.prompt"], ADAPTER)]).build()


@pytest.mark.parametrize(
    "wrong",
    [
        {"placements": [Placement(["encoder.ffn"], ADAPTER), Placement(["encoder.prompt"], ADAPTER)]},
        {"placements": [Placement(["encoder.ffn"], ADAPTER)], "trainable": ["pets"]},
    ],
)
def test_a_model_that_cannot_be_built_leaves_the_language_model_as_it_was(wrong):
    lm = BART.build(tiny_bart())
    with pytest.raises(ValueError, match=r"adds no tokens|unknown trainable rule"):
        VLModel(BART, lm, feature_dim=4, **wrong)
    assert not any(isinstance(module, UnitLinear) for module in lm.modules())


def test_a_site_that_leaves_at_something_else_than_a_linear_layer_is_refused():
    lm = BART.build(tiny_bart())
    sites = {"norm": Site("encoder", "fc1", "final_layer_norm")}
    with pytest.raises(TypeError, match="site 'norm' leaves at 'final_layer_norm', a LayerNorm"):
        inject(BART.layers(lm), sites, [Placement(["norm"], ADAPTER)])


def test_no_placement_is_a_placement_too():
    check_placements([], BART.sites)
    assert put(BART.build(tiny_bart())) == []


def test_a_leaf_called_without_its_sublayer_says_so():
    lm = BART.build(tiny_bart())
    put(lm, Placement(["encoder.ffn"], partial(VLPET, rank=8)))
    with pytest.raises(RuntimeError, match="VLPET was called before the sublayer's input was seen"):
        lm.model.encoder.layers[0].fc2(torch.randn(1, 3, 64))
