"""Gates of decoder-only models, whose units see template, images, text and answer in one sequence."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.backbones.test_causal_runs import random_batch
from tests.backbones.tiny_vlm import END, MODELS, PAD, build, save_smolvlm
from tests.conformance.bench import loud
from tests.data_modules.tiny_data import write_world
from vlpet_lightning import VLModel
from vlpet_lightning.__main__ import run
from vlpet_lightning.batch import IGNORED
from vlpet_lightning.gates.collecting import ALL, Collector
from vlpet_lightning.pet import VLPET, Adapter, LargeGate, Placement, Prompt, SmallGate

KINDS = sorted(MODELS)
SITES = ("decoder.attn", "decoder.ffn")
EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def gated(kind: str, gate: Any = LargeGate, positions: Any = "all", prompt: bool = False) -> VLModel:
    gate = partial(LargeGate, rank=4) if gate is LargeGate else gate
    placements = [Placement(SITES, partial(VLPET, rank=4, heads=2, gate=gate), positions)]
    placements += [Placement("decoder.prompt", partial(Prompt, length=3, hidden=8))] if prompt else []
    model = build(kind, placements, ("pet", "visual_embedding"))
    loud(model.unit_parameters())
    return model


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_factors_are_those_of_the_unit_and_logits_are_bit_equal(kind: str, images: int) -> None:
    model = gated(kind)
    batch = random_batch(model, images)
    expected = model(batch)
    seen: dict[tuple[str, int], Any] = {}
    for place in model.injected:
        key = place.site, place.layer
        place.unit.register_forward_hook(lambda unit, args, out, key=key: seen.update({key: (unit, *args, out)}))
    logits, gates = model(batch, return_gates=True)
    assert torch.equal(logits, expected)
    assert set(gates.factors) == set(seen) == {(site, layer) for site in SITES for layer in (0, 1)}
    for key, (unit, x, h, output) in seen.items():
        assert torch.equal(output, Adapter.forward(unit, x, h) * gates.factors[key])
        assert gates.factors[key].shape == h.shape
        assert gates.kinds["padding"].shape == h.shape[:2]


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_position_has_the_kind_of_its_token(kind: str, images: int) -> None:
    model, tiny = gated(kind), MODELS[kind]
    batch = random_batch(model, images)
    assert batch.labels is not None
    _, gates = model(batch, return_gates=True)
    assert sum(mask.int() for mask in gates.kinds.values()).eq(1).all()  # type: ignore[union-attr]
    part = tiny.template
    newline = kind == "llava"  # a token after the patches
    image = ["image"] * (tiny.per_image - newline) + ["template"] * newline
    around = ["template"] * len(part.image_before) + image + ["template"] * len(part.image_after)
    for row, (ids, labels) in enumerate(zip(batch.input_ids, batch.labels, strict=True)):
        text = ["text"] * int(((ids != PAD) & (ids != END)).sum())
        answer = ["answer"] * (int((labels != IGNORED).sum()) - 1)
        expected = ["template"] * len(part.before) + around * images
        expected += ["template"] * len(part.between) + text + ["template"] * len(part.after) + answer
        place = {int(n): name for name, mask in gates.kinds.items() for n in mask[row].nonzero().flatten()}
        assert [name for _, name in sorted(place.items()) if name != "padding"] == expected


def test_maps_of_two_images_are_the_factors_at_their_tokens() -> None:
    model = gated("llava")
    batch = random_batch(model, images=2)
    _, gates = model(batch, return_gates=True)
    maps = gates.on_images("decoder.attn", 1)
    assert maps.shape == (len(batch), 2, 4, 4)
    means = gates.factors["decoder.attn", 1].mean(dim=-1)
    first = len(MODELS["llava"].template.before)
    assert torch.equal(maps[:, 0].flatten(1), means[:, first : first + 16])
    assert torch.equal(maps[:, 1].flatten(1), means[:, first + 17 : first + 33])  # after the line break


def test_statistics_are_those_of_the_positions_of_a_kind() -> None:
    model = gated("smolvlm")
    batch = random_batch(model)
    batch.ids = [str(number) for number in range(len(batch))]
    collector = Collector(model, tokenizer=None)
    collector.add(batch)
    _, gates = model(batch, return_gates=True)
    cells = collector.cells()
    assert {kind for *_, kind in cells} == {ALL, *gates.kinds} - {"prompt"}
    for (_, site, layer, kind), cell in cells.items():
        mask = ~gates.kinds["padding"] if kind == ALL else gates.kinds[kind]
        factors = gates.factors[site, layer][mask].double()
        assert cell.count == factors.numel()
        assert cell.running.mean == pytest.approx(factors.mean().item())
    example = collector.examples["vqa"][0]
    row = batch.ids.index(example.id)
    expected = gates.on_images("decoder.ffn", 0)[row].flatten()
    np.testing.assert_allclose(example.maps["decoder.ffn", 0], expected.detach(), rtol=1e-6)


@pytest.mark.parametrize("positions", ["prefix", "image"])
@pytest.mark.parametrize("kind", ["llava", "qwen2.5", "smolvlm"])
def test_gates_of_some_positions_have_the_kinds_of_these(kind: str, positions: str) -> None:
    model = gated(kind, positions=positions, prompt=True)
    batch = random_batch(model, images=2)
    batch.ids = [str(number) for number in range(len(batch))]
    expected = model(batch)
    logits, gates = model(batch, return_gates=True)
    assert torch.equal(logits, expected)
    assert gates.kinds["prompt"][:, :3].all()
    assert gates.kinds["prompt"].sum() == 3 * len(batch)
    kinds = gates.kinds_at("decoder.ffn")
    assert kinds["padding"].shape == gates.factors["decoder.ffn", 0].shape[:2]
    assert kinds["image"].sum() == gates.kinds["image"].sum()
    assert not kinds["answer"].any()
    assert bool(kinds["text"].any()) == bool(kinds["prompt"].any()) == (positions == "prefix")
    collector = Collector(model, tokenizer=None)
    collector.add(batch)
    index = gates.positions["decoder.ffn", 0]
    for (_, site, layer, name), cell in collector.cells().items():
        mask = ~kinds["padding"] if name == ALL else gates.kinds[name][:, index]
        assert cell.running.mean == pytest.approx(gates.factors[site, layer][mask].double().mean().item())
    if kind != "qwen2.5":  # no square grid
        whole = gated(kind, prompt=True)(batch, return_gates=True)[1]  # in the first layer, inputs are the same
        torch.testing.assert_close(gates.on_images("decoder.attn", 0), whole.on_images("decoder.attn", 0))


def test_gates_of_a_sample_have_no_kinds() -> None:
    model = gated("smolvlm", SmallGate, "prefix")
    batch = random_batch(model)
    batch.ids = [str(number) for number in range(len(batch))]
    collector = Collector(model, tokenizer=None)
    collector.add(batch)
    assert {kind for *_, kind in collector.cells()} == {ALL}
    with pytest.raises(ValueError, match=r"SmallGate at decoder\.attn has no factors for the positions of an image"):
        model(batch, return_gates=True)[1].on_images("decoder.attn", 0)


@pytest.mark.slow
def test_the_command_reports_every_task_with_its_own_answers(tmp_path: Path) -> None:
    write_world(tmp_path)
    folder = save_smolvlm(tmp_path / "smolvlm")
    (tmp_path / "pictures" / "COCO").mkdir(parents=True)
    for name in np.load(tmp_path / "features" / "COCO" / "ids.npy").astype(str).tolist():
        Image.new("RGB", (20, 16), (90, 90, 0)).save(tmp_path / "pictures" / "COCO" / f"{name}.png")
    checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
    logger = {
        "class_path": "vlpet_lightning.loggers.CSVLog",
        "init_args": {"save_dir": str(tmp_path), "name": "run", "version": "a"},
    }
    trainer = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "limit_val_batches": 0}
    trainer |= {"precision": "32-true", "callbacks": [checkpoint], "logger": logger}
    data = {"root": str(tmp_path), "batch_size": 3, "eval_batch_size": 3, "tasks": ["vqa", "nlvr2"]}
    init = {"backbone": str(folder), "frozen_dtype": "float32"}
    overlay = {"trainer": trainer, "model": {"init_args": init}, "data": {"init_args": data}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(overlay))
    names = ("image_text", "vlm/smolvlm_256m", "vlm/pet/vlpet_large")
    configs = [*(EXPERIMENTS / f"{name}.yaml" for name in names), tmp_path / "tiny.yaml"]
    assert run(["fit", *(word for path in configs for word in ("--config", str(path)))]) == 0
    last = tmp_path / "run" / "a" / "checkpoints" / "last.ckpt"
    words = ["--ckpt_path", str(last), "--device", "cpu", "--images", str(tmp_path / "pictures")]
    assert run(["gates", *words, "--out", str(tmp_path / "out"), "--limit", "4"]) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "gates.csv").open()))
    assert {row["site"] for row in rows} == set(SITES)
    kinds = {task: {row["kind"] for row in rows if row["task"] == task} for task in ("vqa", "nlvr2")}
    assert {"template", "image", "text", ALL} <= kinds["nlvr2"] <= kinds["vqa"] | {"padding"}
    assert "answer" not in kinds["nlvr2"]  # its answer is the token after the template
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"kinds_vqa.png", "overlay_vqa_decoder.attn.png", "positions_nlvr2_decoder.ffn.png"} <= written
    assert json.loads((tmp_path / "out" / "gates.json").read_text())
