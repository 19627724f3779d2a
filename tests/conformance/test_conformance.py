"""All behaviours of every method in the table on BART and T5, and of a selection on other backbones."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import combinations

import pytest

from tests.conformance import KINDS, MORE_KINDS, Bench
from tests.conformance.behaviours import BEHAVIOURS, IMPOSSIBLE
from tests.conformance.cases import CASES
from vlpet_lightning import pet

WITHOUT_PEFT = pytest.mark.skipif(find_spec("peft") is None, reason="needs the extra vlpet-lightning[peft]")
# units that read x and the inner activation, at every sublayer; both prompts; every backbone parameter
SELECTION = ("vlpet-large", "adapter-parallel", "ia3-scale", "prompt-both", "full")


def marks(case, kind):
    slow = [] if kind in KINDS or case.name in SELECTION else [pytest.mark.slow]
    return [*slow, *([WITHOUT_PEFT] if case.peft else [])]


BENCHES = [
    pytest.param((case, kind), id=f"{kind}-{case.name}", marks=marks(case, kind))
    for kind in (*KINDS, *MORE_KINDS)
    for case in CASES
]

OURS = [case for case in CASES if case.peft is None or find_spec("peft") is not None]


@pytest.fixture(scope="module", params=BENCHES)
def bench(request):
    return Bench(*request.param)


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.__name__)
def test_conformance(bench, behaviour):
    reason = IMPOSSIBLE.get(behaviour) or bench.case.impossible.get(behaviour.__name__)
    if reason:
        pytest.skip(reason)
    behaviour(bench)


SAME_FORWARD = {  # they differ in the initialisation
    *("vlpet-ungated", "vlpet-ungated-zero"),
    *("adapter", "adapter-zero"),
    *("ia3-scale", "ia3-normal"),
    *("ia3-delta", "ia3-delta-one"),
}


def test_checkpoints_of_two_methods_are_told_apart():
    """All settings that change the forward pass are in the record, even if names and shapes are the same."""
    records = {}
    for case in OURS:
        bench = Bench(case, "bart")
        module = bench.module(bench.fresh())
        record = module.describe() | {"rules": None}  # rules differ if units do not
        shapes = {name: p.shape for name, p in module.model.unit_parameters().items()}
        records[case.name] = (record, shapes)
    alike = {
        name
        for one, other in combinations(records, 2)
        for name in (one, other)
        if records[one] == records[other] and records[one][1]
    }
    assert alike <= SAME_FORWARD


def test_every_method_has_a_row():
    used = {type(module) for case in OURS for module in Bench(case, "bart").fresh().modules()}
    classes = {kind for kind in vars(pet).values() if isinstance(kind, type) and not hasattr(kind, "__origin__")}
    methods = {kind for kind in classes if issubclass(kind, pet.Unit | pet.Gate)}
    assert {kind.__name__ for kind in methods - used} == {"Unit", "Gate", "SideNetwork"}
    assert len({case.name for case in CASES}) == len(CASES)
