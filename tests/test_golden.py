"""Every experiment's parameters match its golden tree: names, shapes, and which are trained."""

from __future__ import annotations

import pytest

from tests import golden

EXPERIMENTS = golden.experiments()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_parameters_are_those_of_the_golden_tree(name):
    if name.startswith("hf_"):
        pytest.importorskip("peft", reason="methods of Hugging Face peft need the extra")
    assert (golden.TREES / f"{name}.json").exists(), f"no golden tree of {name}: write it with python -m tests.golden"
    changed = golden.differences(golden.read(name), golden.tree_of(EXPERIMENTS[name]))
    assert not changed, "\n".join(
        [
            f"the parameters of experiments/pet/{name}.yaml have changed; if they should: python -m tests.golden",
            *changed,
        ]
    )


def test_every_golden_tree_has_an_experiment():
    assert {path.stem for path in golden.TREES.glob("*.json")} == set(EXPERIMENTS)


def test_collapsing_loses_nothing():
    tree = {f"lm.encoder.block.{index}.layer.1.wo.weight": "8x4 frozen" for index in range(12)}
    tree["lm.encoder.block.3.layer.1.wo.weight"] = "8x4 trained"
    tree |= {"lm.encoder.block.0.layer.0.bias.weight": "2x2 frozen", "visual.feature.0.weight": "4x9 trained"}
    lines = golden.collapse(tree)
    assert golden.expand(lines) == tree
    assert lines["lm.encoder.block.{4..11}.layer.1.wo.weight"] == "8x4 frozen"
    assert len(lines) == 5


def test_a_difference_reads_like_the_file():
    frozen = {f"lm.layers.{index}.w": "2 frozen" for index in range(6)}
    trained = dict.fromkeys(frozen, "2 trained")
    assert golden.differences(frozen, frozen) == []
    assert golden.differences(frozen, trained) == ["- lm.layers.{0..5}.w: 2 frozen", "+ lm.layers.{0..5}.w: 2 trained"]
