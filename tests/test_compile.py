"""The training forward compiles into one graph for every gate, task and mask, with unchanged results."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.runs import make_batch, placements, tiny_module
from vlpet_lightning.backbones import check_compilable
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


def step(loss, model, batch):
    """Return loss and gradients with dropout fixed by the seed."""
    model.zero_grad()
    torch.manual_seed(3)
    value = loss(batch)
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True], ids=["padded", "masked"])
@pytest.mark.parametrize("gate", GATES)
def test_the_loss_of_every_gate_is_one_graph_with_the_same_gradients(tiny_backbone, gate, masked):
    model, batch = build(tiny_backbone, gate, mask_padding=masked), make_batch("vqa", 3, 0)
    expected = step(model.loss, model, batch)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model.loss, fullgraph=True, backend=counter)  # raises at a graph break
    same(step(compiled, model, batch), expected)
    assert counter.frame_count == 1
    assert len(expected[1]) > 20


@pytest.mark.parametrize("task", ["gqa", "nlvr2", "caption"])
def test_the_loss_of_every_task_is_one_graph(tiny_backbone, task):
    model, batch = build(tiny_backbone), make_batch(task, 3, 0)
    expected = step(model.loss, model, batch)
    same(step(torch.compile(model.loss, fullgraph=True, backend="eager"), model, batch), expected)


def test_gradients_traced_ahead_of_time_are_the_same(tiny_backbone):
    # dropout off: a traced graph draws its own random numbers
    model, batch = build(tiny_backbone, "small", mask_padding=True, dropout=0.0), make_batch("vqa", 3, 0)
    expected = step(model.loss, model, batch)
    same(step(torch.compile(model.loss, fullgraph=True, backend="aot_eager"), model, batch), expected)


def test_another_batch_of_the_same_shape_does_not_compile_again(tiny_backbone):
    model, counter = build(tiny_backbone, "small", mask_padding=True), CompileCounterWithBackend("eager")
    compiled = torch.compile(model.loss, fullgraph=True, backend=counter)
    losses = [step(compiled, model, make_batch("vqa", 3, seed))[0] for seed in range(3)]
    assert counter.frame_count == 1
    same(losses, [step(model.loss, model, make_batch("vqa", 3, seed))[0] for seed in range(3)])


def test_a_module_told_to_compile_trains_through_one_graph(tiny_backbone, monkeypatch):
    counter = CompileCounterWithBackend("eager")
    asked = []

    def compile_eagerly(model, **options):
        asked.append(options)
        model._compiled_call_impl = torch.compile(model._call_impl, backend=counter, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    module = tiny_module(tiny_backbone, compile_model=True)
    module.configure_model()
    assert asked == [{"fullgraph": True}]
    module.model.loss(make_batch("vqa", 3, 0)).backward()
    assert counter.frame_count == 1
    assert all(p.grad is not None for p in module.model.parameters() if p.requires_grad)


@pytest.mark.slow
def test_the_default_backend_has_the_same_loss_and_gradients(tiny_backbone):
    model = build(tiny_backbone, dropout=0.0)
    compiled = torch.compile(model.loss, fullgraph=True)
    for seed in range(2):
        batch = make_batch("vqa", 3, seed)
        expected = step(model.loss, model, batch)
        same(step(compiled, model, batch), expected)
