"""All behaviours of nearly every method in the table on BART, and of a selection elsewhere; the rest is slow."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import combinations

import pytest

from tests.conformance import KINDS, MORE_KINDS, Bench
from tests.conformance.behaviours import BEHAVIOURS, IMPOSSIBLE, the_units_compile_to_one_graph
from tests.conformance.cases import CASES
from vlpet_lightning import pet

WITHOUT_PEFT = pytest.mark.skipif(find_spec("peft") is None, reason="needs the extra vlpet-lightning[peft]")
# units that read x and the inner activation, at every sublayer; both prompts; every backbone parameter
SELECTION = ("vlpet-large", "adapter-parallel", "ia3-scale", "prompt-both", "full")
# rows that depend on T5's scales, projections, positions or missing biases
ON_T5 = (*SELECTION, "vlpet-large-scaled-zero", "lora", "dora", "hyperformer-block", "ladder", "bitfit", "peft-lora")
# rows that differ from another one in a number or in the initialisation
MINOR_VARIANTS = {
    *("vlpet-large-scaled-zero", "vlpet-ungated-zero", "vlpet-heads-both", "adapter-zero", "adapter-scaled"),
    *("compacter-shared-rule", "hyperformer-one", "ia3-normal", "ia3-delta-one", "dora-detached", "peft-vera"),
    *("lora-per-task", "prompt-per-task", "gated-per-task"),
}
# rows with the same classes of units and gates as another one: they differ in settings that the graph hardly depends on
VARIANTS = {
    *("vlpet-large-scaled-zero", "vlpet-ungated", "vlpet-ungated-zero", "vlpet-heads-both"),
    *("adapter", "adapter-zero", "adapter-scaled", "adapter-norm-before", "adapter-memory", "adapter-replace"),
    *("adapter-per-task", "lora-per-task", "dora-detached", "compacter", "compacter-shared-rule", "hyperformer-one"),
    *("prompt-encoder", "prompt-decoder", "prompt-per-task", "ia3-delta", "ia3-normal", "ia3-delta-one"),
    *("self-gated", "gated-adapter", "gated-per-task", "gated-value-residual"),
    *("bitfit", "layer-norms", "frozen", "peft-vera", "peft-ia3"),
}


def is_fast(case, kind):
    if kind in MORE_KINDS:
        return case.name in SELECTION
    return case.name not in MINOR_VARIANTS if kind == "bart" else case.name in ON_T5


def compiles_fast(case, kind):  # compiling takes as long as all other behaviours
    if kind in MORE_KINDS:
        return case.name == "vlpet-large"
    return case.name not in VARIANTS if kind == "bart" else case.name in SELECTION


def benches(fast):
    return [
        pytest.param(
            (case, kind),
            id=f"{kind}-{case.name}",
            marks=[*([] if fast(case, kind) else [pytest.mark.slow]), *([WITHOUT_PEFT] if case.peft else [])],
        )
        for kind in (*KINDS, *MORE_KINDS)
        for case in CASES
    ]


OURS = [case for case in CASES if case.peft is None or find_spec("peft") is not None]


@pytest.fixture(scope="module", params=benches(is_fast))
def bench(request):
    return Bench(*request.param)


def conformance(bench, behaviour):
    reason = IMPOSSIBLE.get(behaviour) or bench.case.impossible.get(behaviour.__name__)
    if reason:
        pytest.skip(reason)
    behaviour(bench)


OTHERS = [behaviour for behaviour in BEHAVIOURS if behaviour is not the_units_compile_to_one_graph]


@pytest.mark.parametrize("behaviour", OTHERS, ids=lambda behaviour: behaviour.__name__)
def test_conformance(bench, behaviour):
    conformance(bench, behaviour)


@pytest.mark.parametrize("case_and_kind", benches(compiles_fast))
def test_the_units_compile_to_one_graph(case_and_kind):
    conformance(Bench(*case_and_kind), the_units_compile_to_one_graph)


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
