"""Runs that read image files and train units inside the vision tower: fit, resume, test, export and ask."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from data_modules.store.store import FeatureStoreError
from tests.backbones.test_tower_runs import EXPERIMENTS, UNIT, draw_images, overlay
from tests.backbones.tiny_vlm import SAVED, save
from tests.data_modules.tiny_data import write_world
from tests.requeued import Run, ask
from vlpet_lightning import Predictor, VLCausal, save_pet
from vlpet_lightning.__main__ import run
from vlpet_lightning.api import make_batch
from vlpet_lightning.cost import Step, cost_of
from vlpet_lightning.loggers import read_metrics
from vlpet_lightning.pet import HyperFormer, Placement
from vlpet_lightning.run.signals import STATUS
from vlpet_lightning.vision.images import read_image

GATE = {"class_path": "vlpet_lightning.pet.LargeGate", "init_args": {"rank": 2}}
GATED = {"class_path": "vlpet_lightning.pet.VLPET", "init_args": {"rank": 2, "heads": 2, "gate": GATE}}
PLACEMENTS = [{"at": ["vision.attn", "vision.ffn"], "unit": GATED}, {"at": ["decoder.attn.query"], "unit": UNIT}]
PLACEMENTS.append({"at": ["decoder.ffn"], "unit": GATED, "positions": "prefix"})


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
    assert run(["gates", *checkpoint, "--split", "val", "--out", str(tmp_path / "gates"), "--device", "cpu"]) == 0
    assert "decoder.ffn" in (tmp_path / "gates" / "gates.csv").read_text()
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
def test_the_cost_of_a_step_on_pixels_is_that_of_its_tower_too(kind, known, tmp_path):
    settings = {"trainable": ["visual_embedding"], "image_input": "pixels", **SAVED[kind].settings}
    module = VLCausal(str(save(kind, tmp_path / "backbone")), **settings)
    cost = cost_of(module, Step("vqa", samples=2, text=4, target=2))
    assert (cost.activations is not None) is (cost.memory is not None) is known
    assert cost.tower_weights == cost.tower_flops == 0
    assert cost.weights >= 4 * cost.parameters.total
    with pytest.raises(ValueError, match="vectors is 4: the model reads pixels"):
        cost_of(module, Step("vqa", samples=2, text=4, target=2, vectors=4))


@pytest.fixture(scope="module")
def exported(root, tmp_path_factory):
    """An export of an untrained model that reads pixels, without a record of its images, and its backbone."""
    folder = tmp_path_factory.mktemp("exported")
    backbone = save("smolvlm", folder / "backbone")
    units = [Placement(["vision.attn", "vision.ffn"], HyperFormer.with_(tasks=("vqa", "nlvr2")))]
    settings = {"image_input": "pixels", **SAVED["smolvlm"].settings}
    module = VLCausal(str(backbone), units, ["pet"], **settings)
    module.configure_model()
    save_pet(module, folder / "pet")
    return folder, module


def test_an_export_without_a_record_of_its_images_is_asked(exported, root):
    folder, module = exported
    images = sorted((root / "images" / "COCO").iterdir())[:2]
    predictor = Predictor(folder / "pet", device="cpu")
    pictures = [read_image(path) for path in images]
    reader = module.pixel_reader()
    features = torch.stack([reader(picture) for picture in pictures])
    assert torch.equal(predictor.encode(images), features)
    batch = make_batch(module, "vqa", ["What thing ?"] * 2, features)
    assert predictor([*images], "What thing ?") == module.answer(batch)
    assert isinstance(predictor((images[0], images[1]), "What thing ?"), str)
    with pytest.raises(ValueError, match=r"features for vqa must have shape \(B, F, 16\), got \(2, 4, 8\)"):
        make_batch(module, "vqa", ["What thing ?"] * 2, torch.zeros(2, 4, 8))


def test_another_tower_is_refused(exported, tmp_path):
    folder, _ = exported
    other = shutil.copytree(folder / "backbone", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    changed = {name: 2 * value if "vision_model" in name else value for name, value in weights.items()}
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"not on '.*other': other values in lm\.model\.vision_model"):
        Predictor(folder / "pet", str(other), device="cpu")


def test_a_checkpoint_of_the_other_input_is_named(exported):
    _, module = exported
    features = VLCausal(module.backbone_name, [], ["visual_embedding"], **SAVED["smolvlm"].settings)
    features.configure_model()
    checkpoint: dict = {}
    features.on_save_checkpoint(checkpoint)
    pixels = VLCausal(module.backbone_name, [], ["visual_embedding"], image_input="pixels", **SAVED["smolvlm"].settings)
    pixels.configure_model()
    with pytest.raises(ValueError, match=r"of another method: image_input: features there, pixels here\. Give"):
        pixels.on_load_checkpoint(checkpoint)


def test_an_image_processor_that_does_not_fit_is_found_before_training(exported, tmp_path):
    folder, _ = exported
    other = shutil.copytree(folder / "backbone", tmp_path / "other")
    settings = json.loads((other / "preprocessor_config.json").read_text())
    settings["max_image_size"] = {"longest_edge": 32}
    (other / "preprocessor_config.json").write_text(json.dumps(settings))
    module = VLCausal(str(other), [], ["visual_embedding"], image_input="pixels", **SAVED["smolvlm"].settings)
    with pytest.raises(ValueError, match="makes 32 x 32 pixels of an image, the tower reads 16 x 16"):
        module.pixel_reader()
