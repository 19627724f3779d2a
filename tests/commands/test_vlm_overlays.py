"""Overlays of decoder-only models and their methods, counted on the meta device, and the table in docs/vlm.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vlpet_lightning.backbones import config_of
from vlpet_lightning.commands.params import report_of

ROOT = Path(__file__).parents[2]
MODELS = ("smolvlm_256m", "smolvlm_500m", "paligemma2_3b", "qwen2_5_vl_3b")
ROWS = {
    "the projector alone": "projector",
    "LoRA at query and value": "lora",
    "LoRA of peft at query and value": "hf_lora",
    "DoRA at query and value": "dora",
    "VL-PET-large, gated before the answer": "vlpet_large",
    "VL-PET-large, gated at all positions": "vlpet_large_all",
}
RANK = 32


def counted(model, method):
    files = ("image_text", f"vlm/{model}", f"vlm/pet/{method}")
    return report_of([word for name in files for word in ("--config", str(ROOT / "experiments" / f"{name}.yaml"))])


def units(method, model):
    """Return the parameters of the units by a formula."""
    overlay = yaml.safe_load((ROOT / "experiments" / "vlm" / f"{model}.yaml").read_text())
    text = config_of(overlay["model"]["init_args"]["backbone"], "smolvlm").get_text_config()
    width, layers = text.hidden_size, text.num_hidden_layers
    head = getattr(text, "head_dim", None) or width // text.num_attention_heads
    queries, values = head * text.num_attention_heads, head * text.num_key_value_heads
    lora = RANK * (width + queries) + RANK * (width + values)
    gated = 2 * 2 * (2 * width * RANK + RANK + width)
    light = (width * RANK + RANK) + (RANK * values + values)
    sizes = {"projector": 0, "lora": lora, "hf_lora": lora, "dora": lora + queries + values}
    return layers * (sizes | {"vlpet_large": gated + light, "vlpet_large_all": gated})[method]


@pytest.mark.parametrize("model", [MODELS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS[1:])])
def test_the_table_in_the_docs_is_what_is_counted(model):
    pytest.importorskip("peft")
    lines = (ROOT / "docs" / "vlm.md").read_text().split("\n")
    cells = {row[0]: row[1:] for line in lines if len(row := [c.strip() for c in line.split("|")[1:-1]]) == 5}
    projector = counted(model, "projector").trainable
    for title, method in ROWS.items():
        found = counted(model, method)
        assert found.trainable == projector + units(method, model)
        assert cells[title][MODELS.index(model)] == f"{found.trainable:,} ({found.percent:.2f} %)"
