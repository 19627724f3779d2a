"""Runs on features of a model's own vision tower: extract, fit, test, export and ask."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from data_modules import FeatureStore
from tests.backbones.tiny_vlm import SAVED, save
from tests.data_modules.tiny_data import write_world
from vlpet_lightning.__main__ import run
from vlpet_lightning.loggers import read_metrics

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
UNIT = {"class_path": "vlpet_lightning.pet.LoRA", "init_args": {"rank": 2}}
# image settings that are not those of the features
OTHERS = {"qwen2.5": {"image_size": [32, 48]}, "smolvlm tiled": {"tiling": [2, 2]}, "llava": {"tiling": [2, 3]}}


def draw_images(features, out):
    """Draw an image for each row of the feature stores, which are removed."""
    generator = torch.Generator().manual_seed(0)
    for store in sorted(features.iterdir()):
        (out / store.name).mkdir(parents=True)
        for number, name in enumerate(FeatureStore(store).ids):
            pixels = torch.randint(256, (20 + number % 3, 30, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(out / store.name / f"{name}.png")
    shutil.rmtree(features)


def overlay(root, backbone, settings):
    checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
    logger = {"save_dir": str(root), "name": "run", "version": "a"}
    model = {
        "backbone": str(backbone),
        "placements": [{"at": ["decoder.attn.query"], "unit": UNIT}],
        "trainable": ["pet"],
        "feature_dim": None,
        "grid": None,
    }
    return {
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "limit_train_batches": 4,
            "log_every_n_steps": 1,
            "logger": {"class_path": "vlpet_lightning.loggers.CSVLog", "init_args": logger},
            "callbacks": [checkpoint, {"class_path": "callbacks.VQAMetrics"}],
            "enable_progress_bar": False,
        },
        "model": {"class_path": "vlpet_lightning.VLCausal", "init_args": model | settings},
        "data": {"init_args": {"root": str(root), "batch_size": 3, "tasks": ["vqa", "nlvr2"]}},
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_a_run_on_extracted_features_is_tested_exported_and_asked(kind, tmp_path, capsys):
    backbone, settings = save(kind, tmp_path / "backbone"), SAVED[kind].settings
    write_world(tmp_path)
    draw_images(tmp_path / "features", tmp_path / "images")
    words = [word for name, value in settings.items() for word in (f"--{name}", json.dumps(value))]
    places = ["--source", str(tmp_path / "images"), "--out", str(tmp_path / "features"), "--each_folder", "true"]
    assert run(["data", "extract", "images", *places, "--model", f"hf:{backbone}", *words, "--device", "cpu"]) == 0
    config = ["--config", str(EXPERIMENTS / "image_text.yaml"), "--config", str(tmp_path / "tiny.yaml")]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(overlay(tmp_path, backbone, settings | OTHERS[kind])))
    with pytest.raises(
        ValueError, match=r"the train features of vqa were made with (image_size|tiling) .*, the model has"
    ):
        run(["fit", *config])
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(overlay(tmp_path, backbone, settings)))
    assert run(["fit", *config]) == 0
    rows = read_metrics(tmp_path / "run" / "a")
    losses = [row[name] for row in rows for name in ("train/vqa/loss", "train/nlvr2/loss") if name in row]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
    checkpoint = ["--ckpt_path", str(tmp_path / "run" / "a" / "checkpoints" / "last.ckpt")]
    assert run(["test", *config, *checkpoint]) == 0
    assert any("test/vqa/accuracy" in row for row in read_metrics(tmp_path / "run" / "a"))
    assert run(["export", *checkpoint, "--out", str(tmp_path / "pet")]) == 0
    image = next((tmp_path / "images" / "COCO").iterdir())
    capsys.readouterr()
    words = ["--model", str(tmp_path / "pet"), "--image", str(image), "what color ?", "--json", "--device", "cpu"]
    assert run(["ask", *words]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["answers"]
