"""Layers compile without graph breaks for every gate, task and mask, with unchanged results."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.runs import make_batch, placements, tiny_module
from vlpet_lightning.backbones import check_compilable
from vlpet_lightning.compilation import compile_layers
from vlpet_lightning.pet import LargeGate, MiddleXGate, MiddleYGate, SmallGate

GATES = {"large": partial(LargeGate, rank=8), "middleX": MiddleXGate, "middleY": MiddleYGate, "small": SmallGate}


def compilable():
    try:
        check_compilable()
    except ValueError:
        return False
    return True


pytestmark = pytest.mark.skipif(not compilable(), reason="this transformers' own BART breaks the graph")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(backbone, gate="large", **changes):
    torch.manual_seed(0)
    return tiny_module(backbone, placements=placements(gate=GATES[gate]), **changes).build().train()


def step(model, batch):
    """Return loss and gradients with dropout fixed by the seed."""
    model.zero_grad()
    torch.manual_seed(3)
    value = model.loss(batch)
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True], ids=["padded", "masked"])
@pytest.mark.parametrize(
    "gate", ["large", "small", *(pytest.param(gate, marks=pytest.mark.slow) for gate in ("middleX", "middleY"))]
)
def test_the_layers_of_a_stack_share_one_graph_with_the_same_gradients(tiny_backbone, gate, masked):
    model, batch = build(tiny_backbone, gate, mask_padding=masked), make_batch("vqa", 3, 0)
    expected = step(model, batch)
    counter = CompileCounterWithBackend("eager")
    compile_layers(model.layers(), fullgraph=True, backend=counter)  # raises at a graph break
    same(step(model, batch), expected)
    # the first layer reads embeddings without a gradient history in BART's decoder
    assert counter.frame_count <= 3
    assert len(expected[1]) > 20


@pytest.mark.parametrize("task", ["gqa", "nlvr2", "caption"])
def test_every_task_compiles(tiny_backbone, task):
    model, batch = build(tiny_backbone), make_batch(task, 3, 0)
    expected = step(model, batch)
    compile_layers(model.layers(), fullgraph=True, backend="eager")
    same(step(model, batch), expected)


def test_gradients_traced_ahead_of_time_are_the_same(tiny_backbone):
    # dropout off: a traced graph draws its own random numbers
    model, batch = build(tiny_backbone, "small", mask_padding=True, dropout=0.0), make_batch("vqa", 3, 0)
    expected = step(model, batch)
    compile_layers(model.layers(), fullgraph=True, backend="aot_eager")
    same(step(model, batch), expected)


@pytest.mark.slow
def test_further_batches_compile_once_more_for_another_length_and_then_never(tiny_backbone):
    model, eager = build(tiny_backbone, "small", mask_padding=True), build(tiny_backbone, "small", mask_padding=True)
    counter = CompileCounterWithBackend("eager")
    compile_layers(model.layers(), fullgraph=True, backend=counter)
    frames = []
    for seed, (words, targets) in enumerate([(7, 4), (7, 4), (6, 3), (5, 2), (7, 3), (4, 4)]):
        batch = make_batch("vqa", 3, seed)
        batch = replace(batch, input_ids=batch.input_ids[:, :words], labels=batch.labels[:, :targets])
        same(step(model, batch), step(eager, batch))
        frames.append(counter.frame_count)
    assert frames[0] == frames[1]
    assert frames[2] > frames[1]
    assert len(set(frames[2:])) == 1


def test_generation_does_not_compile(tiny_backbone):
    model, batch = build(tiny_backbone), make_batch("caption", 3, 0)
    expected = model.eval().generate(batch, num_beams=2, max_length=6), model.choose(batch, (5, 6))
    counter = CompileCounterWithBackend("eager")
    compile_layers(model.layers(), fullgraph=True, backend=counter)
    assert torch.equal(model.generate(batch, num_beams=2, max_length=6), expected[0])
    assert torch.equal(model.choose(batch, (5, 6)), expected[1])
    assert counter.frame_count == 0


def test_a_module_told_to_compile_compiles_its_layers(tiny_backbone, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **options: asked.append((type(layer), options)))
    module = tiny_module(tiny_backbone, compile_model=True)
    module.configure_model()
    assert [kind.__name__ for kind, _ in asked] == ["BartEncoderLayer"] * 2 + ["BartDecoderLayer"] * 2
    assert all(options == {"fullgraph": True} for _, options in asked)


@pytest.mark.slow
def test_the_default_backend_has_the_same_loss_and_gradients(tiny_backbone):
    model, eager = build(tiny_backbone, dropout=0.0), build(tiny_backbone, dropout=0.0)
    compile_layers(model.layers(), fullgraph=True)
    for seed in range(2):
        batch = make_batch("vqa", 3, seed)
        same(step(model, batch), step(eager, batch))
