"""Models with injected units: copies, devices, checkpointing and generation."""

from __future__ import annotations

import copy
import io
import zlib
from functools import partial

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from tests.parity import tiny_bart
from tests.runs import make_batch, placements, tiny_module
from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.model import VLModel
from vlpet_lightning.parameters import count_parameters
from vlpet_lightning.pet import (
    LargeGate,
    MiddleXGate,
    MiddleYGate,
    ParallelAdapter,
    Placement,
    SmallGate,
    UnitLinear,
)

BART = BACKBONES["bart"]
GATES = {"large": partial(LargeGate, rank=8), "middleX": MiddleXGate, "middleY": MiddleYGate, "small": SmallGate}
ADAPTER = partial(ParallelAdapter, rank=4)


def build(backbone, gate="large", **changes):
    """Build a model in evaluation mode with ten times larger backbone weights, so that every token matters.

    The backbone's weights depend only on their names, so two models share them whatever their units.
    """
    model = tiny_module(backbone, **{"placements": placements(gate=GATES[gate])} | changes).build().eval()
    units = model.unit_parameters()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name in units:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.normal_(std=0.2, generator=generator)
    return model


def without_units(backbone):
    return build(backbone, placements=[], trainable=["visual_embedding"])


def gradients(model, batch):
    model.zero_grad()
    torch.manual_seed(7)
    model.loss(batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


PAIRS = [
    pytest.param(("encoder.attn.query", "encoder.attn"), id="leaf-first"),
    pytest.param(("encoder.attn", "encoder.attn.query"), id="leaf-last"),
    pytest.param(("decoder.cross.value", "decoder.cross"), id="other-leaves"),
]


@pytest.mark.parametrize("sites", PAIRS)
def test_sites_that_share_a_leaf_work_in_either_order(tiny_backbone, sites):
    both = [Placement([site], ADAPTER) for site in sites]
    model = build(tiny_backbone, placements=both)
    model.start_as_identity()
    batch = make_batch("vqa", 3, 0)
    assert torch.equal(model(batch), without_units(tiny_backbone)(batch))


def kept(model):
    return [name for name, m in model.named_modules() if isinstance(m, UnitLinear) and m._entered is not None]


def test_an_input_is_kept_no_longer_than_its_call(tiny_backbone):
    model, batch = build(tiny_backbone), make_batch("vqa", 2, 0)
    hosts = [m for m in model.modules() if isinstance(m, UnitLinear) and not m.reads_own_input]
    during = []
    for host in hosts:
        host.unit.register_forward_pre_hook(lambda module, args, host=host: during.append(host._entered))
    model.loss(batch).backward()
    assert during == [None] * len(hosts)
    assert kept(model) == []


def copies(model):
    """Copy by deepcopy, by pickle through torch.save, and by both."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    pickled = torch.load(buffer, weights_only=False)
    return {"deepcopy": copy.deepcopy(model), "pickle": pickled, "both": copy.deepcopy(pickled)}


@pytest.mark.parametrize("gate", GATES)
def test_copies_compute_the_same_and_share_nothing(tiny_backbone, gate):
    model, batch = build(tiny_backbone, gate, mask_padding=True), make_batch("vqa", 3, 0)
    expected = model(batch)
    for how, twin in copies(model).items():
        assert torch.equal(twin(batch), expected), how
        assert {id(p) for p in twin.parameters()}.isdisjoint({id(p) for p in model.parameters()}), how
        with torch.no_grad():
            for parameter in twin.unit_parameters().values():
                parameter.add_(1)
        assert not torch.allclose(twin(batch), expected), how
        assert torch.equal(model(batch), expected), how


def test_a_copy_knows_its_own_units(tiny_backbone):
    model = build(tiny_backbone, "small", mask_padding=True)
    for how, twin in copies(model).items():
        mine = {id(m) for m in twin.modules()}
        assert all(id(place.unit) in mine for place in twin.injected), how
        assert all(id(reader) in mine for reader in twin._context_readers), how
        assert list(twin.unit_parameters()) == list(model.unit_parameters()), how


@pytest.mark.parametrize("gate", GATES)
def test_counts_on_the_meta_device_are_those_of_real_weights(gate):
    def count(device):
        with torch.device(device):
            lm = BART.build(tiny_bart())
        # units are built outside the device context: injection moves them to the backbone's device
        model = VLModel(BART, lm, feature_dim=16, placements=placements(gate=GATES[gate]), trainable=["pet"])
        assert {p.device.type for p in model.unit_parameters().values()} == {device}
        return count_parameters(model)

    assert count("meta") == count("cpu")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_gradient_checkpointing_gives_the_same_gradients(tiny_backbone, gate, reentrant):
    model = build(tiny_backbone, gate, mask_padding=True).train()
    batch = make_batch("vqa", 3, 0)
    expected = gradients(model, batch)
    calls = []
    model.injected[0].unit.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    enable = getattr(model.lm, "activation_checkpointing_enable", None) or model.lm.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})  # older versions know only the second name
    ours = gradients(model, batch)
    assert len(calls) == 2  # in forward, and again in backward
    assert set(ours) == set(expected)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-4 or "box" in name, name
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)
    assert kept(model) == []


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("gate", GATES)
def test_generation_with_a_cache_equals_generation_without(tiny_backbone, gate, beams):
    model, batch = build(tiny_backbone, gate), make_batch("caption", 3, 0)
    answers = {}
    for use_cache in (True, False):
        settings = model.backbone.generation(model.lm.config, beams, 8)
        settings.use_cache = use_cache
        states = BaseModelOutput(last_hidden_state=model.encode(batch).detach())
        answers[use_cache] = model.lm.generate(
            encoder_outputs=states, attention_mask=model.mask(batch), generation_config=settings
        )
    assert torch.equal(answers[True], answers[False])
    assert torch.equal(answers[True], model.generate(batch, num_beams=beams, max_length=8))
    assert len({tuple(answer) for answer in answers[True].tolist()}) > 1  # the question matters
    assert answers[True].shape[1] == 8


def test_generation_projects_the_values_once_a_layer(tiny_backbone):
    model, batch = build(tiny_backbone), make_batch("caption", 2, 0)
    calls = []
    for place in model.injected:
        if place.site == "decoder.cross.value":
            place.unit.register_forward_hook(lambda *_, layer=place.layer: calls.append(layer))
    assert model.generate(batch, num_beams=1, max_length=8).shape[1] > 3
    assert calls == [0, 1]


@pytest.mark.parametrize("gate", GATES)
def test_with_the_identity_start_the_whole_model_is_the_pretrained_function(tiny_backbone, gate):
    batch = make_batch("nlvr2", 3, 0)
    bare, model = without_units(tiny_backbone), build(tiny_backbone, gate)
    assert not torch.allclose(model(batch), bare(batch))
    model.start_as_identity()
    assert torch.equal(model(batch), bare(batch))
    ids = {"input_ids": batch.input_ids, "labels": batch.labels}
    assert torch.equal(model.lm(**ids).logits, bare.lm(**ids).logits)  # stock forward without joint encoder


@pytest.mark.parametrize("gate", GATES)
def test_a_module_that_starts_as_the_identity_begins_with_the_pretrained_loss(tiny_backbone, gate):
    model = tiny_module(tiny_backbone, start="identity", placements=placements(gate=GATES[gate])).build().eval()
    bare = without_units(tiny_backbone)
    bare.load_state_dict({name: t for name, t in model.state_dict().items() if ".unit." not in name})
    batch = make_batch("vqa", 3, 0)
    assert torch.equal(model.loss(batch), bare.loss(batch))


@pytest.mark.parametrize("setting", [{"start": "identity"}, {"mask_padding": True}])
def test_a_checkpoint_of_another_forward_is_refused(tiny_backbone, setting):
    checkpoint = {}
    trained, other = tiny_module(tiny_backbone, **setting), tiny_module(tiny_backbone)
    for module in (trained, other):
        module.configure_model()
    trained.on_save_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="this checkpoint is of another method"):
        other.on_load_checkpoint(checkpoint)
