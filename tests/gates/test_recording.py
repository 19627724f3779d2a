"""Recorded factors are those that the units apply, on both backbones, and recording leaves no trace in the model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.gates.models import GATES, KINDS, batch_of
from tests.runs import placements
from tests.test_compile import compilable
from vlpet_lightning import VLModel
from vlpet_lightning.compilation import compile_layers
from vlpet_lightning.gates import encode_with_gates
from vlpet_lightning.pet import (
    VLPET,
    Adapter,
    Gated,
    L2NormGate,
    LargeGate,
    LayerNormGate,
    LoRA,
    PerTask,
    Placement,
    Prompt,
    SelfGated,
    SmallGate,
)

SHAPES = {"large": "BSd", "full": "BSd", "middleX": "BS1", "small": "B11"}  # the others: d
AXES = {
    "large": ("sample", "token", "channel"),
    "full": ("sample", "token", "channel"),
    "middleX": ("sample", "token"),
    "small": ("sample",),
}
WORDS = 7  # of make_batch; the last sample has two positions of padding


def seen_by(model: VLModel, units: type) -> tuple[dict[tuple[str, int], tuple[Tensor, ...]], list[Any]]:
    """Keep the input and output of every unit of a kind."""
    seen: dict[tuple[str, int], tuple[Tensor, ...]] = {}

    def keep(key: tuple[str, int]) -> Callable[..., None]:
        return lambda module, args, output: seen.update({key: (*args, output)})

    handles = [
        place.unit.register_forward_hook(keep((place.site, place.layer)))
        for place in model.injected
        if isinstance(place.unit, units)
    ]
    return seen, handles


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", GATES)
def test_the_factors_are_those_that_the_unit_multiplies_by(models: Any, gate: str, kind: str, scale: float) -> None:
    placed = placements(gate=GATES[gate])
    placed[0] = Placement(placed[0].at, partial(VLPET, rank=8, heads=4, gate=GATES[gate], scale=scale))
    model, batch = models(kind, placed), batch_of(kind)
    seen, handles = seen_by(model, VLPET)
    _, gates = model(batch, return_gates=True)
    for handle in handles:
        handle.remove()
    assert set(gates.factors) == {(site, layer) for site in ("encoder.attn", "encoder.ffn") for layer in (0, 1)}
    for place in model.injected[:4]:
        x, h, output = seen[place.site, place.layer]
        factors = gates.factors[place.site, place.layer]
        adapted = Adapter.forward(place.unit, x, h)
        assert torch.equal(output, adapted * factors if scale == 1 else adapted * factors * scale)
        sizes = dict(zip("BSd1", (*h.shape, 1), strict=True))
        assert factors.shape == torch.Size(sizes[symbol] for symbol in SHAPES.get(gate, "d"))
        source = gates.sources[place.site, place.layer]
        assert source.axes(factors, h.shape[1]) == AXES.get(gate, ("channel",))
        assert not factors.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("training", [False, True])
def test_logits_and_gradients_are_bit_equal_with_and_without_recording(
    models: Any, gate: str, kind: str, training: bool
) -> None:
    model, batch = models(kind, placements(gate=GATES[gate]), mask_padding=True), batch_of(kind)
    model.train(training)
    results = []
    for wanted in (False, True):
        model.zero_grad()
        torch.manual_seed(3)  # of dropout
        found = model(batch, return_gates=True)[0] if wanted else model(batch)
        found.square().sum().backward()
        results.append((found.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert torch.equal(results[0][0], results[1][0])
    assert any(".gate." in name for name in results[0][1])
    assert results[0][1].keys() == results[1][1].keys()
    assert all(torch.equal(grad, results[1][1][name]) for name, grad in results[0][1].items())
    assert not any(module._forward_hooks for module in model.modules())


def test_recording_leaves_no_hook_after_an_error(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models("bart", placements())

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(model.backbone, "decode", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        model(batch_of("bart"), return_gates=True)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.skipif(not compilable(), reason="this transformers' own BART breaks the graph")
@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_model_keeps_its_graph_and_its_logits(models: Any, training: bool) -> None:
    torch._dynamo.reset()
    # dropout off: the eager pass of the comparison draws other random numbers
    model, batch = models("bart", placements(), dropout=0.0).train(training), batch_of("bart")
    expected = model(batch, return_gates=True)[1].factors
    counter = CompileCounterWithBackend("eager")
    compile_layers(model.layers(), fullgraph=True, backend=counter)
    before = model(batch)
    frames = counter.frame_count
    assert frames > 0
    during, gates = model(batch, return_gates=True)
    after = model(batch)
    assert counter.frame_count == frames
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert all(torch.allclose(gates.factors[key], factors) for key, factors in expected.items())
    torch._dynamo.reset()


@pytest.mark.skipif(not compilable(), reason="this transformers' own BART breaks the graph")
def test_recording_draws_no_random_numbers_of_the_training(models: Any) -> None:
    torch._dynamo.reset()
    model, batch = models("bart", placements()).train(), batch_of("bart")
    compile_layers(model.layers(), fullgraph=True, backend="eager")
    states = []
    for wanted in (False, True):
        torch.manual_seed(3)
        found = model(batch, return_gates=True)[0] if wanted else model(batch)
        states.append((found, torch.get_rng_state()))
    assert all(torch.equal(*pair) for pair in zip(*states, strict=True))
    torch._dynamo.reset()


@pytest.mark.skipif(not compilable(), reason="this transformers' own BART breaks the graph")
def test_recording_compiles_nothing_even_before_the_first_step(models: Any) -> None:
    torch._dynamo.reset()
    model, batch = models("bart", placements()), batch_of("bart")
    counter = CompileCounterWithBackend("eager")
    compile_layers(model.layers(), fullgraph=True, backend=counter)
    encode_with_gates(model, batch)
    assert counter.frame_count == 0
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["vqa", "nlvr2"])
@pytest.mark.parametrize("length", [0, 3])
def test_every_position_has_one_kind(models: Any, task: str, kind: str, length: int) -> None:
    placed = placements()
    if length:
        placed.append(Placement(["encoder.prompt"], partial(Prompt, length=length)))
    model, batch = models(kind, placed), batch_of(kind, task)
    gates = encode_with_gates(model, batch)
    images = 2 if task == "nlvr2" else 1
    assert gates.images == images
    assert torch.equal(sum(mask.long() for mask in gates.kinds.values()), torch.ones_like(gates.kinds["text"]).long())
    rows = [
        ["prompt"] * length + ["text"] * WORDS + ["image"] * (4 * images),
        ["prompt"] * length + ["text"] * (WORDS - 2) + ["padding"] * 2 + ["image"] * (4 * images),
    ]
    for sample, expected in ((0, rows[0]), (2, rows[1])):
        place = [next(name for name, mask in gates.kinds.items() if mask[sample, i]) for i in range(len(expected))]
        assert place == expected
        assert gates.kinds["text"].shape[1] == len(expected)
    assert gates.factors["encoder.attn", 0].shape[1] == gates.kinds["text"].shape[1]


def test_masked_frames_are_padding(models: Any) -> None:
    model, batch = models("bart", placements()), batch_of("bart")
    model.visual.grid = None
    shown = torch.ones(3, 4, dtype=torch.bool)
    shown[1, 2:] = False
    gates = encode_with_gates(model, replace(batch, feature_mask=shown))
    assert torch.equal(gates.kinds["image"][:, WORDS:], shown)
    assert torch.equal(gates.kinds["padding"][:, WORDS:], ~shown)


def test_targets_and_padding_of_the_decoder(models: Any) -> None:
    at = ["decoder.attn", "decoder.cross", "decoder.ffn", "decoder.cross.value", "decoder.cross.query"]
    placed = [Placement(at, partial(Gated, gate=partial(LargeGate, rank=4)))]
    model, batch = models("bart", placed), batch_of("bart")
    _, gates = model(batch, return_gates=True)
    assert batch.labels is not None
    real = batch.labels != -100
    for site in at:
        kinds, factors = gates.kinds_at(site), gates.factors[site, 1]
        assert factors.shape[:2] == next(iter(kinds.values())).shape
        if site == "decoder.cross.value":
            assert kinds is gates.kinds  # it reads the encoder's output
        else:
            assert torch.equal(kinds["target"], real)
            assert torch.equal(kinds["padding"], ~real)


def test_the_prompt_of_the_decoder_is_not_mistaken_for_its_targets(models: Any) -> None:
    gated = partial(Gated, gate=partial(LargeGate, rank=4))
    prompt = Placement(["decoder.prompt"], partial(Prompt, length=4))  # as long as the targets
    model = models("bart", [Placement(["decoder.ffn", "decoder.cross.memory"], gated), prompt])
    batch = batch_of("bart")
    seen, handles = seen_by(model, Gated)  # of the last call
    _, gates = model(batch, return_gates=True)
    for handle in handles:
        handle.remove()
    assert len(gates.factors) == 4
    for (site, layer), (x, h, output) in seen.items():
        assert torch.equal(output, h * gates.factors[site, layer])
        assert x.shape[1] == gates.factors[site, layer].shape[1]


def test_a_unit_that_is_its_own_gate_is_recorded(models: Any) -> None:
    model, batch = models("bart", [Placement(["encoder.ffn"], partial(SelfGated, rank=8))]), batch_of("bart")
    seen, handles = seen_by(model, SelfGated)
    _, gates = model(batch, return_gates=True)
    for handle in handles:
        handle.remove()
    x, h, output = seen["encoder.ffn", 1]
    delta = model.injected[1].unit.up(torch.nn.functional.gelu(model.injected[1].unit.down(x), approximate="tanh"))
    assert torch.equal(delta + h * gates.factors["encoder.ffn", 1], output)


def test_a_gate_of_every_task_is_recorded_in_its_own_task(models: Any) -> None:
    unit = partial(VLPET, rank=8, heads=4, gate=partial(LargeGate, rank=8))
    model = models("bart", [Placement(["encoder.attn"], partial(PerTask, unit=unit, tasks=["vqa", "nlvr2"]))])
    for task in ("vqa", "nlvr2"):
        batch = batch_of("bart", task)
        gates = encode_with_gates(model, batch)
        assert set(gates.factors) == {("encoder.attn", 0), ("encoder.attn", 1)}
        own = model.injected[0].unit.units[task].gate
        assert gates.sources["encoder.attn", 0].gate is own


def test_two_gates_of_one_unit_are_told_apart(models: Any) -> None:
    inner = partial(VLPET, rank=8, heads=4, gate=partial(LargeGate, rank=8))
    model = models("bart", [Placement(["encoder.ffn"], partial(Gated, unit=inner, gate=SmallGate))])
    gates = encode_with_gates(model, batch_of("bart"))
    assert {site for site, _ in gates.factors} == {"encoder.ffn:gate", "encoder.ffn:unit.gate"}
    assert gates.factors["encoder.ffn:gate", 0].shape == (3, 1, 1)
    assert gates.kinds_at("encoder.ffn:gate") is gates.kinds


@pytest.mark.parametrize(
    ("placed", "said"),
    [
        ([], "has no units; use"),
        ([Placement(["encoder.attn.query"], partial(LoRA, rank=2))], "has units LoRA; use"),
        (
            [Placement(["encoder.ffn"], partial(VLPET, rank=8, gate=LayerNormGate))],
            "has units VLPET, whose LayerNormGate has no factors; use",
        ),
        (
            [Placement(["encoder.ffn"], partial(Gated, gate=L2NormGate))],
            "has units Gated, whose L2NormGate has no factors; use",
        ),
    ],
)
def test_a_method_without_gates_is_named(models: Any, placed: list[Placement], said: str) -> None:
    model, batch = models("bart", placed), batch_of("bart")
    for record in (lambda: model(batch, return_gates=True), lambda: encode_with_gates(model, batch)):
        with pytest.raises(ValueError, match=f"no gates to record: it {said} a method with gates, e.g. experiments/"):
            record()


def test_disabled_units_are_named(models: Any) -> None:
    model = models("bart", placements())
    model.enabled = False
    with pytest.raises(ValueError, match=r"units are disabled, so that no gate is computed: set model\.enabled"):
        model(batch_of("bart"), return_gates=True)


def test_gates_of_the_decoder_alone_need_labels(models: Any) -> None:
    placed = [Placement(["decoder.ffn"], partial(Gated, gate=partial(LargeGate, rank=4)))]
    model: nn.Module = models("bart", placed)
    with pytest.raises(ValueError, match="gates in its decoder only: call model"):
        encode_with_gates(model, batch_of("bart"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no labels"):
        model(replace(batch_of("bart"), labels=None), return_gates=True)


def test_a_batch_without_labels_has_gates_of_the_encoder(models: Any) -> None:
    model, batch = models("bart", placements()), batch_of("bart")
    _, expected = model(batch, return_gates=True)
    gates = encode_with_gates(model, replace(batch, labels=None))
    assert gates.target_kinds == {}
    assert gates.factors.keys() == expected.factors.keys()
    assert all(torch.equal(gates.factors[key], factors) for key, factors in expected.factors.items())


def test_the_example_of_the_documentation_runs(models: Any, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "gates.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    exec(compile(code, "docs/gates.md", "exec"), {"model": models("bart", placements()), "batch": batch_of("bart")})
    assert "torch.Size([3, 1, 2, 2])" in capsys.readouterr().out
