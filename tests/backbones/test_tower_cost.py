"""FLOPs and weights of vision towers, which stored features save, and what ``params`` and ``compare`` say of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.backbones.tiny_vlm import MODELS, SIDE, build, save_smolvlm
from vlpet_lightning import VLCausal
from vlpet_lightning.__main__ import run
from vlpet_lightning.backbones import BACKBONES, config_of
from vlpet_lightning.cost import Step, cost_of
from vlpet_lightning.flops import tower_flops

ROOT = Path(__file__).parents[2]
KINDS = sorted(MODELS)


@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_a_tower_are_those_that_torch_counts(kind):
    model = build(kind)
    pixels = torch.randn(1, 3, SIDE, SIDE)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        MODELS[kind].extract(model.lm, pixels)
    merger = 0
    if kind == "qwen2.5":  # which the library runs with the tower
        width = 4 * MODELS[kind].config.vision_config.hidden_size
        merger = 2 * MODELS[kind].per_image * (width**2 + width * MODELS[kind].config.vision_config.out_hidden_size)
    assert tower_flops(model) == counter.get_total_flops() - merger


def test_windows_of_qwen_are_smaller_at_the_edges():
    config = config_of("Qwen/Qwen2.5-VL-3B-Instruct", "qwen2_5_vl")
    backbone = BACKBONES["qwen2_5_vl"].with_image_size(28 * 5, 28 * 4)  # tokens; a window is 4 x 4 tokens
    within = (8 * 8) ** 2 + (2 * 8) ** 2
    found = backbone.tower_attentions(config)
    assert len(found) == 32
    assert sum(found) == 1280 * (28 * within + 4 * (10 * 8) ** 2)
    assert [layer for layer, work in enumerate(found) if work == 1280 * (10 * 8) ** 2] == [7, 15, 23, 31]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_smolvlm(tmp_path_factory.mktemp("smolvlm"))


def test_the_cost_of_training_leaves_out_the_tower(folder):
    module = VLCausal(str(folder))
    cost = cost_of(module, Step("nlvr2", samples=2, text=4, target=2))
    module.configure_model()
    loaded = [t for t in (*module.parameters(), *module.buffers()) if not t.is_meta]
    assert cost.weights == sum(t.nbytes for t in loaded)
    assert cost.tower_weights == sum(4 * p.numel() for p in module.parameters() if p.is_meta)
    assert cost.tower_flops == 2 * tower_flops(module.model)  # two images
    assert cost.parameters.total == sum(p.numel() for p in module.parameters())


def test_the_template_is_counted_if_there_is_a_tokenizer(folder, tmp_path):
    step = Step("nlvr2", samples=2, text=4, target=2)
    found = cost_of(VLCausal(str(folder)), step)
    # <|im_start|>User:, two times <fake_token_around_image><global-img> and <fake_token_around_image>, and
    # <end_of_utterance>, a line break and Assistant: without the last token, which is the first input of the decoder
    assert found.template_tokens == 3 + 2 * 3 + 3
    assert found.encoder_tokens == 2 * 1 + 4 + found.template_tokens
    (tmp_path / "config.json").symlink_to(folder / "config.json")
    bare = cost_of(VLCausal(str(tmp_path)), step)
    assert bare.template_tokens is None
    assert bare.encoder_tokens == 2 * 1 + 4
    assert bare.flops < found.flops


SMOLVLM = [f"experiments/{name}.yaml" for name in ("image_text", "vlm/smolvlm_256m", "vlm/pet/lora")]


def test_params_says_what_stored_features_save(capsys):
    assert run(["params", *(word for path in SMOLVLM for word in ("--config", str(ROOT / path)))]) == 0
    said = " ".join(capsys.readouterr().out.split())
    width, inner, layers, patches = 768, 3072, 12, 1024
    matrices = width * 3 * 16**2 + layers * (4 * width**2 + 2 * width * inner)
    flops = 2 * matrices * patches + 4 * width * layers * patches**2
    vectors = width + layers * (4 * width + width + inner + 4 * width) + 2 * width  # biases and norms
    parameters = matrices + vectors + patches * width
    assert f"{parameters:,} of these parameters are the vision tower's" in said
    assert f"saves {4 * parameters / 2**20:.1f} MiB in float32, and {flops / 1e9:.2f} GFLOP per image" in said


def test_compare_says_what_stored_features_save(folder, tmp_path):
    overlay = yaml.safe_load((ROOT / SMOLVLM[1]).read_text())
    overlay["model"]["init_args"]["backbone"] = str(folder)
    tiny, out = tmp_path / "tiny.yaml", tmp_path / "found.md"
    tiny.write_text(yaml.safe_dump(overlay))
    sides = [f"image_text+{tiny}+vlm/pet/{name}" for name in ("projector", "lora")]
    assert run(["compare", *sides, "--batch-size", "1", "--text", "2", "--out", str(out)]) == 0
    lines = out.read_text().split("\n")
    assert f"{1 + 2 + 9} encoder tokens with 9 of the template" in lines[2]
    rows = {cells[1].strip(): cells[2] for line in lines if len(cells := line.split("|")) == 7}
    cost = cost_of(VLCausal(str(folder), frozen_dtype="bfloat16"), Step("vqa", 1, 2, 5, precision="bf16-mixed"))
    assert rows["of the vision tower (not run)"].split() == [f"{cost.tower_flops / 1e9:.2f}", "GFLOP"]
    assert rows["of the vision tower (not loaded)"].split() == [f"{cost.tower_weights / 1024:.1f}", "KiB"]
