"""The tables in docs/backbones.md are what is counted."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from tests.backbones.test_known import PUBLISHED
from tests.backbones.test_known_vlm import KNOWN
from vlpet_lightning.commands.compare import read_side
from vlpet_lightning.cost import cost_of, default_step
from vlpet_lightning.display import as_bytes, gigaflops

ROOT = Path(__file__).parents[2]
STEP = {"samples": 16, "text": 20, "target": 5}
MODELS = {  # overlay by backbone, which it is read with
    "HuggingFaceTB/SmolVLM-256M-Instruct": "smolvlm_256m",
    "HuggingFaceTB/SmolVLM-500M-Instruct": "smolvlm_500m",
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": "smolvlm_256m",
    "google/paligemma2-3b-pt-224": "paligemma2_3b",
    "Qwen/Qwen2.5-VL-3B-Instruct": "qwen2_5_vl_3b",
}
METHODS = {"VL-PET-large": "vlpet_large", "LoRA": "lora"}


def rows_of(width: int) -> list[list[str]]:
    """Return the cells of the document's tables of a width."""
    lines = (ROOT / "docs" / "backbones.md").read_text().split("\n")
    split = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return [cells for cells in split if len(cells) == width]


def cells(model: str, method: str) -> list[str]:
    """Return the cells of a model and a method."""
    side = read_side(f"image_text+vlm/{MODELS[model]}+vlm/pet/{METHODS[method]}", ["--model.backbone", model])
    cost = cost_of(side.module, default_step("vqa", side.settings, **STEP))
    states = cost.gradients + cost.optimizer
    figures = cost.weights, states, cost.activations, cost.memory, cost.memory + cost.tower_weights
    flops = cost.flops, cost.flops + cost.tower_flops
    return [model, method, f"{cost.parameters.trainable:,}", *map(gigaflops, flops), *map(as_bytes, figures)]


def test_parameters_of_models_known_by_name():
    names = {f"`{name}`": f"{count:,}" for name, count in PUBLISHED.items()}
    names |= {f"`{name}`": f"{count:,}" for name, (count, _) in KNOWN.items()}
    assert {row[0]: row[2] for row in rows_of(3) if row[0].startswith("`")} == names


@pytest.mark.parametrize(
    ("model", "method"),
    [
        pytest.param(*case, marks=[] if case == ("HuggingFaceTB/SmolVLM-256M-Instruct", "LoRA") else pytest.mark.slow)
        for case in product(MODELS, METHODS)
    ],
)
def test_cost_of_a_step(model, method):
    found = cells(model, method)
    assert found in rows_of(len(found))
