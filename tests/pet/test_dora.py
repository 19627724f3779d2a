"""DoRA against plain algebra: the adapted weight, its gradients, and where it may be placed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.runs import tiny_module
from vlpet_lightning.pet import DoRA, Placement, UnitLinear

D, RANK, SCALE = 6, 2, 0.7


def hosted(**settings):
    """A linear layer with a DoRA unit behind it, all of it drawn at random."""
    torch.manual_seed(0)
    host = UnitLinear(nn.Linear(D, D))
    unit = DoRA(D, rank=RANK, scale=SCALE, **settings)
    host.unit = unit
    unit.bind(host)
    return host, unit


def loud(unit):
    with torch.no_grad():
        unit.lora_B.weight.normal_()
        unit.magnitude.mul_(torch.rand(D) + 0.5)


def adapted(host, unit, *, detach=False):
    """The definition, written out: W' row by row."""
    rows = []
    change = SCALE * unit.lora_B.weight @ unit.lora_A.weight
    for row in range(D):
        direction = host.weight[row] + change[row]
        norm = (direction**2).sum().sqrt()
        rows.append(unit.magnitude[row] * direction / (norm.detach() if detach else norm))
    return torch.stack(rows)


def test_it_starts_as_the_frozen_layer_exactly():
    host, _ = hosted()
    x = torch.randn(3, 4, D)
    assert torch.equal(host(x), nn.functional.linear(x, host.weight, host.bias))


@pytest.mark.parametrize("detach", [False, True])
def test_output_and_gradients_are_those_of_the_adapted_weight(detach):
    host, unit = hosted(detach_norm=detach)
    loud(unit)
    x, direction = torch.randn(3, 4, D), torch.randn(3, 4, D)
    parameters = [unit.lora_A.weight, unit.lora_B.weight, unit.magnitude]
    ours = host(x)
    theirs = x @ adapted(host, unit, detach=detach).T + host.bias
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad((ours * direction).sum(), parameters),
        torch.autograd.grad((theirs * direction).sum(), parameters),
    )


def test_the_norm_changes_the_gradient_unless_it_is_detached():
    gradients = []
    for detach in (False, True):
        host, unit = hosted(detach_norm=detach)
        loud(unit)
        host(torch.ones(1, D)).sum().backward()
        gradients.append(unit.lora_B.weight.grad)
    assert not torch.allclose(*gradients)


def test_it_merges_into_the_layer():
    host, unit = hosted()
    loud(unit)
    x = torch.randn(5, D)
    expected = host(x)
    plain = nn.Linear(D, D)
    plain.load_state_dict({"weight": host.weight, "bias": host.bias})
    unit.merge(plain)
    torch.testing.assert_close(plain(x), expected)


def test_a_copy_reads_the_weight_of_its_own_layer():
    host, unit = hosted()
    other = copy.deepcopy(host)
    assert other.unit.linear is other
    assert unit.linear is host
    assert set(host.state_dict()) == {"weight", "bias", "unit.lora_A.weight", "unit.lora_B.weight", "unit.magnitude"}


def test_it_cannot_run_without_its_layer():
    with pytest.raises(RuntimeError, match="no linear layer yet"):
        DoRA(D, rank=RANK)(torch.zeros(1, D), torch.zeros(1, D))


@pytest.mark.parametrize("site", ["encoder.attn", "encoder.ffn", "encoder.ffn.inner"])
def test_a_site_without_one_linear_layer_is_refused(site, tiny_backbone):
    placement = Placement([site], lambda width: DoRA(width, rank=RANK))
    with pytest.raises(ValueError, match=f"DoRA at site '{site}' computes with the weight of one linear layer"):
        tiny_module(tiny_backbone, placements=[placement]).configure_model()
