"""Units in isolation: formulas of gates, shapes, padding and initialisation."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.oracles.bart_layers import GATES as WRITTEN
from tests.oracles.bart_layers import Algebra, gated_branch
from vlpet_lightning.pet import (
    VLPET,
    Context,
    Gate,
    LargeGate,
    MiddleXGate,
    MiddleYGate,
    ParallelAdapter,
    SmallGate,
    Unit,
)

WIDTH, RANK, LENGTH = 12, 8, 5
GATES = {"large": partial(LargeGate, rank=4), "middleX": MiddleXGate, "middleY": MiddleYGate, "small": SmallGate}
SHAPES = {"large": (3, LENGTH, WIDTH), "middleX": (3, LENGTH, 1), "middleY": (WIDTH,), "small": (3, 1, 1)}
UNITS = {
    **{f"vl-pet-{name}": partial(VLPET, rank=RANK, gate=gate) for name, gate in GATES.items()},
    "ungated": partial(VLPET, rank=RANK),
    "scaled": partial(VLPET, rank=RANK, gate=GATES["large"], scale=0.3),
    "parallel-adapter": partial(ParallelAdapter, rank=RANK),
    "scaled-parallel-adapter": partial(ParallelAdapter, rank=RANK, scale=4.0),
}


def loud(module, seed=1):
    """Return the module in float64, with parameters large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.normal_(std=0.5, generator=generator)
    return module


def draw(seed, dtype=torch.float64, samples=3):
    return torch.randn(samples, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


# gates ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GATES)
def test_a_gate_is_its_formula(name):
    gate, x, h = loud(GATES[name](WIDTH)), draw(2), draw(3)
    close(gate(x, h), WRITTEN[name](Algebra(), gate.state_dict(), x, h, None))


@pytest.mark.parametrize("name", GATES)
def test_a_gate_has_the_shape_of_its_granularity(name):
    assert loud(GATES[name](WIDTH))(draw(2), draw(3)).shape == SHAPES[name]


@pytest.mark.parametrize(("name", "reads"), [("large", "x"), ("middleX", "xh"), ("middleY", ""), ("small", "xh")])
def test_a_gate_reads_what_its_formula_says(name, reads):
    gate, x, h = loud(GATES[name](WIDTH)), draw(2), draw(3)
    changed = {"x": gate(draw(4), h), "h": gate(x, draw(4))}
    assert {key for key, new in changed.items() if not torch.equal(new, gate(x, h))} == set(reads)


def test_middle_x_adds_where_small_concatenates():
    middle, small, x, h = loud(MiddleXGate(WIDTH)), loud(SmallGate(WIDTH)), draw(2), draw(3)
    assert middle.score.in_features == WIDTH
    assert small.score.in_features == 2 * WIDTH
    close(middle(x, h), middle(h, x))
    assert not torch.allclose(small(x, h), small(h, x))


def test_a_token_of_the_large_and_middle_x_gates_depends_on_no_other_token():
    x, h = draw(2), draw(3)
    for name in ("large", "middleX"):
        gate = loud(GATES[name](WIDTH))
        close(gate(x, h)[:, 2:3], gate(x[:, 2:3], h[:, 2:3]))


@pytest.mark.parametrize("name", ["large", "middleX", "small"])
def test_a_fresh_sigmoid_gate_begins_near_one_half(name):
    torch.manual_seed(0)
    factors = GATES[name](WIDTH)(draw(2, torch.float32), draw(3, torch.float32))
    assert (factors - 0.5).abs().max() < 0.1


def test_a_fresh_middle_y_gate_begins_near_one():
    torch.manual_seed(0)
    factors = MiddleYGate(WIDTH)(draw(2), draw(3))
    assert 0 < (factors - 1).abs().max() < 0.1


@pytest.mark.parametrize("method", ["forward", "start_as_identity"])
def test_a_gate_without_a_method_says_which(method):
    arguments = [draw(2), draw(3)] if method == "forward" else []
    with pytest.raises(NotImplementedError, match=f"Gate must define {method}"):
        getattr(Gate(), method)(*arguments)


# padding --------------------------------------------------------------------------------------------------------------

REAL = torch.tensor([[True] * LENGTH, [True] * 3 + [False] * 2, [True] + [False] * 4])


def test_the_small_gate_averages_over_padding_unless_told():
    gate, x, h = loud(SmallGate(WIDTH)), draw(2), draw(3)
    alone = [gate(x[[i], :length], h[[i], :length]) for i, length in enumerate(REAL.sum(dim=1).tolist())]
    padded = gate(x, h)
    close(padded[:1], alone[0])  # the sample that fills its row
    assert all((padded[i] - alone[i]).abs().max() > 1e-3 for i in (1, 2))
    gate.context = Context("vqa", None)  # a context without a mask has no padding
    assert torch.equal(gate(x, h), padded)


def test_the_small_gate_averages_over_real_tokens_when_told():
    gate, x, h = loud(SmallGate(WIDTH)), draw(2), draw(3)
    alone = [gate(x[[i], :length], h[[i], :length]) for i, length in enumerate(REAL.sum(dim=1).tolist())]
    gate.context = Context("vqa", REAL)
    assert gate(x, h).shape == SHAPES["small"]
    close(gate(x, h), torch.cat(alone))
    close(gate(x, h), WRITTEN["small"](Algebra(), gate.state_dict(), x, h, REAL))


def test_what_stands_on_padding_never_matters_to_a_small_gate_that_is_told():
    gate, x, h = loud(SmallGate(WIDTH)), draw(2), draw(3)
    gate.context = Context("vqa", REAL)
    before = gate(x, h)
    x[~REAL], h[~REAL] = 7.0, -7.0
    close(gate(x, h), before)


def test_only_the_small_gate_asks_for_a_context():
    assert {name for name, gate in GATES.items() if gate(WIDTH).needs_context} == {"small"}


# units ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize("name", GATES)
def test_vl_pet_is_its_formula_with_any_number_of_heads(name, heads):
    unit, x, h = loud(VLPET(WIDTH, rank=RANK, heads=heads, gate=GATES[name])), draw(2), draw(3)
    close(unit(x, h), gated_branch(Algebra(), unit.state_dict(), x, h, name, heads, None))


def test_heads_of_the_down_projection_change_neither_output_nor_start():
    x, h, built = draw(2, torch.float32), draw(3, torch.float32), {}
    for heads in (1, 2, 4, 8):
        torch.manual_seed(0)
        built[heads] = VLPET(WIDTH, rank=RANK, heads=heads, gate=GATES["large"])
    expected = built[1](x, h)
    for unit in built.values():
        assert {name: p.shape for name, p in unit.named_parameters()} == {
            name: p.shape for name, p in built[1].named_parameters()
        }
        assert torch.equal(unit(x, h), expected)


def test_the_gate_scales_the_pretrained_output_as_well():
    unit, x, h = loud(VLPET(WIDTH, rank=RANK, gate=GATES["large"])), draw(2), draw(3)
    with torch.no_grad():
        for parameter in (unit.up.weight, unit.up.bias):
            parameter.zero_()
    close(unit(x, h), h * unit.gate(x, h))


def test_the_gate_sees_the_adapted_output():
    unit, x, h = loud(VLPET(WIDTH, rank=RANK, gate=MiddleXGate)), draw(2), draw(3)
    adapted = loud(VLPET(WIDTH, rank=RANK), seed=9)
    adapted.load_state_dict({name: t for name, t in unit.state_dict().items() if not name.startswith("gate")})
    close(unit(x, h), adapted(x, h) * unit.gate(x, adapted(x, h)))
    assert not torch.allclose(unit.gate(x, adapted(x, h)), unit.gate(x, h))


def test_the_scale_of_vl_pet_multiplies_the_whole_branch():
    scaled, plain = (loud(VLPET(WIDTH, rank=RANK, gate=SmallGate, scale=scale)) for scale in (0.3, 1.0))
    x, h = draw(2), draw(3)
    close(scaled(x, h), 0.3 * plain(x, h))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_parallel_adapter_reads_what_enters_and_scales_its_own_part(scale):
    unit, x, h = loud(ParallelAdapter(WIDTH, rank=RANK, scale=scale)), draw(2), draw(3)
    ops, weights = Algebra(), unit.state_dict()
    hidden = ops.gelu_new(ops.linear(x, weights["down.weight"], weights["down.bias"]))
    close(unit(x, h), h + scale * ops.linear(hidden, weights["up.weight"], weights["up.bias"]))


@pytest.mark.parametrize("name", UNITS)
def test_a_fresh_unit_is_no_identity_and_one_told_to_start_as_the_identity_is(name):
    torch.manual_seed(0)
    unit, x, h = UNITS[name](WIDTH), draw(2, torch.float32), draw(3, torch.float32)
    assert not torch.equal(unit(x, h), h)
    unit.start_as_identity()
    assert torch.equal(unit(x, h), h)


@pytest.mark.parametrize("name", UNITS)
def test_a_used_unit_can_be_set_back_to_the_identity(name):
    unit, x, h = loud(UNITS[name](WIDTH)), draw(2), draw(3)
    unit.start_as_identity()
    assert torch.equal(unit(x, h), h)


@pytest.mark.parametrize("name", UNITS)
def test_every_part_of_an_identity_can_still_learn(name):
    """Train for two steps: a down projection has no gradient while its up projection is zero."""
    unit, x, h = UNITS[name](WIDTH).double(), draw(2), draw(3)
    unit.start_as_identity()
    start = {key: p.detach().clone() for key, p in unit.named_parameters()}
    optimizer = torch.optim.SGD(unit.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (unit(x, h) - draw(6)).square().mean().backward()
        optimizer.step()
    assert [key for key, p in unit.named_parameters() if torch.equal(p, start[key])] == []


def test_a_unit_without_an_identity_start_says_what_to_do():
    with pytest.raises(ValueError, match="Unit has no identity start: use `start: original`"):
        Unit().start_as_identity()


def test_a_unit_without_a_forward_says_so():
    with pytest.raises(NotImplementedError, match=r"Unit must define forward\(x, h\)"):
        Unit()(draw(2), draw(3))


def test_gate_parameters_are_those_of_the_gate():
    for name, build in UNITS.items():
        unit = build(WIDTH)
        gates = {id(p) for p in unit.gate_parameters()}
        assert {key for key, p in unit.named_parameters() if id(p) in gates} == {
            key for key, _ in unit.named_parameters() if key.startswith("gate.")
        }, name


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: VLPET(WIDTH, rank=6, heads=4), "rank 6 is not divisible by heads 4"),
        (lambda: VLPET(WIDTH, rank=0), "rank must be at least 1, got 0"),
        (lambda: VLPET(WIDTH, rank=8, heads=-1), "heads must be at least 1, got -1"),
        (lambda: LargeGate(WIDTH, rank=0), "rank must be at least 1, got 0"),
        (lambda: ParallelAdapter(WIDTH, rank=-2), "rank must be at least 1, got -2"),
    ],
)
def test_sizes_that_cannot_be_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()
