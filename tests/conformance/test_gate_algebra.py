"""Coarser gates are special cases of finer ones: the same weights in a finer gate give the same factors."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.conformance import KINDS, Bench, Case
from vlpet_lightning.pet import (
    VLPET,
    Adapter,
    Compacter,
    FullGate,
    Gated,
    LargeGate,
    LoRA,
    LowRankAdapter,
    MiddleXGate,
    MiddleYGate,
    ParallelAdapter,
    Placement,
    SelfGated,
    SmallGate,
)

WIDTH, RANK, LENGTH, SAMPLES = 12, 8, 5, 3
SITES = ["encoder.attn", "encoder.ffn", "decoder.attn", "decoder.cross", "decoder.ffn"]
GATES = {
    "large": partial(LargeGate, rank=RANK),
    "full": FullGate,
    "middleX": MiddleXGate,
    "middleY": MiddleYGate,
    "middleY-paper": partial(MiddleYGate, form="paper"),
    "small": SmallGate,
}


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def set_to(gate, score, bias):
    """Set a gate's weights, in place, so that it computes ``sigmoid(score . x + bias)`` of a token.

    gelu(z) - gelu(-z) = z, for both forms of gelu, so a bottleneck of two, score and -score, transmits a number.
    """
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.zero_()
        if isinstance(gate, LargeGate):
            gate.down.weight[:2] = torch.stack([score, -score])
            gate.up.weight[:, 0], gate.up.weight[:, 1] = 1.0, -1.0
            gate.up.bias.fill_(bias)
        elif isinstance(gate, FullGate):
            gate.full.weight.copy_(score.expand_as(gate.full.weight))
            gate.full.bias.fill_(bias)
        else:
            gate.score.weight.copy_(score.repeat(gate.score.in_features // len(score)))
            gate.score.bias.fill_(bias)


def same_for_every_token(score):
    """Return ``x`` and ``h`` whose tokens differ, with the same ``score . x`` within a sample, and ``score . h`` 0."""
    x, h = draw(2, SAMPLES, LENGTH, WIDTH), draw(3, SAMPLES, LENGTH, WIDTH)
    along = score / score.square().sum()
    x = x - (x @ score).unsqueeze(-1) * along + draw(4, SAMPLES, 1, 1) * along
    return x, h - (h @ score).unsqueeze(-1) * along


def test_a_small_gate_is_a_middle_x_gate_with_equal_rows_and_a_large_one_with_equal_entries():
    score = draw(1, WIDTH)
    x, h = same_for_every_token(score)
    expected = torch.sigmoid(x[:, :1] @ score + 0.3).unsqueeze(-1)  # (B, 1, 1), a different number for every sample
    assert expected.flatten().unique().numel() == SAMPLES
    for name in ("large", "full", "middleX", "small"):
        gate = GATES[name](WIDTH).double()
        set_to(gate, score, 0.3)
        torch.testing.assert_close(gate(x, h).expand_as(h), expected.expand_as(h), rtol=0, atol=1e-12)


def test_a_middle_x_gate_is_a_large_one_with_equal_columns():
    score = draw(1, WIDTH)
    x, h = draw(2, SAMPLES, LENGTH, WIDTH), torch.zeros(SAMPLES, LENGTH, WIDTH, dtype=torch.float64)
    gates = {name: GATES[name](WIDTH).double() for name in ("large", "full", "middleX")}
    for gate in gates.values():
        set_to(gate, score, 0.3)
    factors = {name: gate(x, h).expand_as(h) for name, gate in gates.items()}
    assert factors["middleX"][..., 0].flatten().unique().numel() == SAMPLES * LENGTH
    for name in ("large", "full"):
        torch.testing.assert_close(factors[name], factors["middleX"], rtol=0, atol=1e-12)


def test_a_middle_y_gate_is_a_large_one_that_reads_nothing():
    vector, x = draw(1, WIDTH), draw(2, SAMPLES, LENGTH, WIDTH)
    middle, full = MiddleYGate(WIDTH, form="paper").double(), FullGate(WIDTH).double()
    with torch.no_grad():
        middle.vector.copy_(vector)
        full.full.weight.zero_()
        full.full.bias.copy_(vector)
    torch.testing.assert_close(middle(x, x).expand_as(x), 1 + full(x, x), rtol=0, atol=1e-12)


# through the whole model ----------------------------------------------------------------------------------------------


def placed(kind, *placements, trainable=("pet",)):
    """Build a bench with these placements."""
    return Bench(Case("algebra", placements, lambda sizes: 0, trainable=trainable), kind)


def gated(kind, gate, **settings):
    bench = placed(kind, Placement(SITES, partial(VLPET, rank=RANK, gate=gate, **settings)))
    return bench, bench.loud()


@pytest.mark.parametrize("kind", KINDS)
def test_gates_that_are_one_number_are_the_same_model(kind):
    logits = []
    for name, gate in GATES.items():
        bench, model = gated(kind, gate)
        for place in model.injected:
            one = 0.2 * place.layer - 0.4
            if not name.startswith("middleY"):
                set_to(place.unit.gate, torch.zeros(model.lm.config.d_model), one)
                continue
            number = torch.sigmoid(torch.tensor(one))
            with torch.no_grad():
                place.unit.gate.vector.fill_(number - 1 if name == "middleY" else 0.0)
            if name == "middleY-paper":
                place.unit.gate.scale = number.item() / 1.5
        logits.append(bench.logits(model))
    assert not torch.allclose(logits[0], bench.logits(bench.bare), rtol=1e-2)
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_gate_with_equal_columns_is_the_full_one_through_the_whole_model(kind):
    logits = []
    for name in ("large", "full"):
        bench, model = gated(kind, GATES[name])
        for place in model.injected:
            set_to(place.unit.gate, draw(place.layer, model.lm.config.d_model).float(), 0.1)
        logits.append(bench.logits(model))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_of_one_is_the_ungated_model(kind, name):
    bench, model = gated(kind, GATES[name])
    plain, ungated = gated(kind, None)
    before = bench.logits(model)
    for place in model.injected:
        place.unit.gate.start_as_identity()
    assert not torch.allclose(bench.logits(model), before, rtol=1e-2)
    assert torch.equal(bench.logits(model), plain.logits(ungated))


LAST = {"up.weight", "up.bias", "up.W", "up.b", "up.left", "lora_B.weight"}  # zero: they are the last layer of a unit
WITH_UP = {
    "adapter": partial(Adapter, rank=RANK),
    "pairs": partial(Adapter, rank=RANK, heads=4, split="pairs"),
    "parallel": partial(ParallelAdapter, rank=RANK, scale=4.0),
    "vlpet": partial(VLPET, rank=RANK),
    "compacter": partial(Compacter, rank=RANK),
    "low-rank": partial(LowRankAdapter, rank=RANK, factor_rank=2),
    "lora": partial(LoRA, rank=RANK),
    "gated": partial(Gated, unit=partial(Adapter, rank=RANK)),
}


@pytest.mark.parametrize("name", WITH_UP)
@pytest.mark.parametrize("kind", KINDS)
def test_an_up_projection_of_zero_is_the_backbone(kind, name):
    sites = ["encoder.attn.query", "decoder.cross.value"] if name == "lora" else SITES
    bench = placed(kind, Placement(sites, WITH_UP[name]))
    model, expected = bench.loud(), bench.logits(bench.bare)
    assert not torch.allclose(bench.logits(model), expected, rtol=1e-2)
    with torch.no_grad():
        for key, parameter in model.unit_parameters().items():
            if any(key.endswith(f".{last}") for last in LAST):
                parameter.zero_()
    assert torch.equal(bench.logits(model), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_self_gate_of_zero_halves_every_branch_like_a_gate_of_one_half(kind):
    bench = placed(kind, Placement(SITES, partial(SelfGated, rank=RANK)))
    model = bench.loud()
    with torch.no_grad():
        for place in model.injected:
            for parameter in place.unit.up.parameters():
                parameter.zero_()
    half = placed(kind, Placement(SITES, partial(Gated, scale=0.5)), trainable=())
    assert torch.equal(bench.logits(model), half.logits(half.fresh()))
