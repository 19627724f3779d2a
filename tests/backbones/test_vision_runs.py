"""Runs that read image files and train units inside the vision tower: fit, resume, test, export and ask."""

from __future__ import annotations

import json
import math

import pytest
import yaml

from tests.backbones.test_tower_runs import EXPERIMENTS, UNIT, draw_images, overlay
from tests.backbones.tiny_vlm import SAVED, save
from tests.data_modules.tiny_data import write_world
from vlpet_lightning.__main__ import run
from vlpet_lightning.loggers import read_metrics

GATE = {"class_path": "vlpet_lightning.pet.LargeGate", "init_args": {"rank": 2}}
GATED = {"class_path": "vlpet_lightning.pet.VLPET", "init_args": {"rank": 2, "heads": 2, "gate": GATE}}
PLACEMENTS = [{"at": ["vision.attn", "vision.ffn"], "unit": GATED}, {"at": ["decoder.attn.query"], "unit": UNIT}]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A world with image files and no features."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    draw_images(folder / "features", folder / "images")
    return folder


def config_of(root, out, backbone, kind, **changes):
    """Write a config of a run on the image files."""
    settings = overlay(root, backbone, SAVED[kind].settings | {"image_input": "pixels"})
    settings["model"]["init_args"]["placements"] = PLACEMENTS
    settings["data"]["init_args"] |= {"images": str(root / "images"), "num_workers": 0}
    settings["trainer"]["logger"]["init_args"]["save_dir"] = str(out)
    for path, value in changes.items():
        *parents, name = path.split("__")
        part = settings
        for parent in parents:
            part = part[parent]
        part[name] = value
    out.mkdir(exist_ok=True)
    (out / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return ["--config", str(EXPERIMENTS / "image_text.yaml"), "--config", str(out / "tiny.yaml")]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind != "smolvlm" else kind for kind in sorted(SAVED)]
)
def test_a_run_on_image_files_is_tested_exported_and_asked(kind, root, tmp_path, capsys):
    backbone = save(kind, tmp_path / "backbone")
    config = config_of(root, tmp_path / "out", backbone, kind)
    assert run(["fit", *config]) == 0
    folder = tmp_path / "out" / "run" / "a"
    rows = read_metrics(folder)
    losses = [row[name] for row in rows for name in ("train/vqa/loss", "train/nlvr2/loss") if name in row]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
    checkpoint = ["--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]
    assert run(["test", *config, *checkpoint]) == 0
    assert any("test/vqa/accuracy" in row for row in read_metrics(folder))
    assert run(["export", *checkpoint, "--out", str(tmp_path / "pet")]) == 0
    image = next((root / "images" / "COCO").iterdir())
    capsys.readouterr()
    words = ["--model", str(tmp_path / "pet"), "--image", str(image), "what color ?", "--json", "--device", "cpu"]
    assert run(["ask", *words]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["answers"]
