"""Runs that read image files and train units inside the vision tower: fit, resume, test, export and ask."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import yaml

from data_modules.store.store import FeatureStoreError
from tests.backbones.test_tower_runs import EXPERIMENTS, UNIT, draw_images, overlay
from tests.backbones.tiny_vlm import SAVED, save
from tests.data_modules.tiny_data import write_world
from tests.requeued import Run, ask
from vlpet_lightning import VLCausal
from vlpet_lightning.__main__ import run
from vlpet_lightning.cost import Step, cost_of
from vlpet_lightning.loggers import read_metrics
from vlpet_lightning.run.signals import STATUS

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


@pytest.mark.slow
def test_an_interrupted_run_on_image_files_has_the_weights_of_an_undisturbed_one(root, tmp_path):
    backbone = save("smolvlm", tmp_path / "backbone")
    changes = {"data__init_args__num_workers": 2, "trainer__logger__init_args__version": "one"}
    config_of(root, tmp_path / "out", backbone, "smolvlm", **changes)
    trainer = {"max_epochs": 2, "limit_train_batches": 4, "limit_val_batches": 1}
    checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
    trainer["callbacks"] = [{"class_path": "callbacks.Preemption"}, checkpoint]
    runs = [Run(tmp_path / "out" / "tiny.yaml", tmp_path / name, **trainer) for name in ("whole", "interrupted")]
    assert runs[1].end_here(*ask(hook="backward", at=3)) == STATUS
    assert runs[1].load("resume.ckpt")["global_step"] < 8
    assert [one.end_here() for one in runs] == [0, 0]
    whole, resumed = (one.load("last.ckpt")["state_dict"] for one in runs)
    assert any("vision_model" in name for name in whole)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


@pytest.mark.slow
def test_an_unreadable_image_ends_a_run_in_one_sentence(root, tmp_path):
    images = shutil.copytree(root / "images", tmp_path / "images")
    for path in (images / "VG").iterdir():
        path.write_bytes(b"no image")
    backbone = save("smolvlm", tmp_path / "backbone")
    changes = {"data__init_args__images": str(images), "data__init_args__num_workers": 2}
    changes["data__init_args__tasks"] = ["gqa"]
    config = config_of(root, tmp_path / "out", backbone, "smolvlm", **changes)
    words = [sys.executable, "-m", "vlpet_lightning", "fit", *config]
    done = subprocess.run(words, cwd=EXPERIMENTS.parent, capture_output=True, text=True, timeout=120)  # it may not hang
    assert done.returncode == 1
    assert re.search(r"UnreadableImage: the image .*\.png cannot be read \(no image, .*\): copy it again", done.stderr)
    assert "Traceback" not in done.stderr


def test_model_and_data_must_agree_on_pixels(root, tmp_path):
    backbone = save("smolvlm", tmp_path / "backbone")
    for changes, message in (
        (
            {"data__init_args__images": None},
            "image_input is pixels, and the data module reads stored features: set",
        ),
        (
            {"model__init_args__image_input": "features"},
            r"site 'vision\.attn' cannot be used: .* set image_input of",
        ),
        (
            {"model__init_args__image_input": "features", "model__init_args__placements": []}
            | {"model__init_args__trainable": ["visual_embedding"]},
            r"reads the image files of .*images, and VLCausal reads stored features: remove `images`",
        ),
        ({"data__init_args__bank": "ram"}, r"images is .* and bank is ram: bank is about stored features"),
        ({"model__init_args__image_input": "both"}, "image_input"),
    ):
        config = config_of(root, tmp_path / "out", backbone, "smolvlm", **changes)
        with pytest.raises((ValueError, FeatureStoreError, SystemExit)) as error:
            run(["fit", *config])
        assert isinstance(error.value, SystemExit) or re.search(message, str(error.value))
        assert not list((tmp_path / "out").rglob("*.ckpt"))


@pytest.mark.parametrize(("kind", "known"), [("qwen2.5", False), ("paligemma", True)])
def test_the_cost_of_a_step_on_pixels_is_estimated_or_refused(kind, known, tmp_path):
    module = VLCausal(
        str(save(kind, tmp_path / "backbone")),
        trainable=["visual_embedding"],
        image_input="pixels",
        **SAVED[kind].settings,
    )
    step = Step("vqa", samples=2, text=4, target=2)
    with (
        nullcontext() if known else pytest.raises(ValueError, match="memory of a qwen2_5_vl model on pixels cannot be")
    ):
        cost = cost_of(module, step)
        assert cost.tower_weights == cost.tower_flops == 0
        assert cost.weights >= 4 * cost.parameters.total
