"""``export``: files from a run's checkpoint reproduce its scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.data_modules.tiny_data import DIM, write_world
from vlpet_lightning import load_pet
from vlpet_lightning.__main__ import for_the_user, run
from vlpet_lightning.loggers import read_metrics

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SITES = ["encoder.attn.query", "decoder.cross.value"]
METHODS = {
    "lora": {
        "placements": [{"at": SITES, "unit": {"class_path": "vlpet_lightning.pet.LoRA", "init_args": {"rank": 4}}}],
        "trainable": ["pet", "visual_embedding", "bias"],
    },
    "full": {"placements": [], "trainable": ["all"]},
    "dora": {
        "placements": [],
        "peft": {
            "class_path": "peft.LoraConfig",
            "init_args": {"r": 4, "use_dora": True, "target_modules": ["q_proj"]},
        },
        "trainable": ["pet", "visual_embedding"],
    },
    "vlpet": {},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_backbone):
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    shutil.copytree(tiny_backbone, root / "backbone")
    return root


@pytest.fixture(scope="module")
def fitted(root, tmp_path_factory):
    """Arguments and checkpoint of a run of each method, created on first use."""
    made = {}

    def fit(method):
        if method not in made:
            folder = tmp_path_factory.mktemp(method)
            made[method] = words_of(root, folder, METHODS[method]), folder / "run" / "a" / "checkpoints" / "last.ckpt"
            assert run(["fit", *made[method][0]]) == 0
        return made[method]

    return fit


def words_of(root, folder, model):
    shipped = yaml.safe_load((EXPERIMENTS / "image_text.yaml").read_text())["trainer"]["callbacks"]
    kept = ("VQAMetrics", "ModelCheckpoint")
    callbacks = [
        c for c in shipped if c["class_path"].endswith(kept) and c.get("init_args", {}).get("filename") != "resume"
    ]
    logger = {"class_path": "vlpet_lightning.loggers.CSVLog", "init_args": {"save_dir": str(folder), "name": "run"}}
    logger["init_args"]["version"] = "a"
    trainer = {"max_epochs": 1, "accelerator": "cpu", "logger": logger, "enable_progress_bar": False}
    overlay = {
        "trainer": trainer | {"callbacks": callbacks, "log_every_n_steps": 1},
        "model": {
            "init_args": {"backbone": str(root / "backbone"), "feature_dim": DIM, "grid": 2, "lr": 0.01, **model}
        },
        "data": {"init_args": {"root": str(root), "batch_size": 3, "tasks": ["vqa", "nlvr2"]}},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(overlay))
    return ["--config", str(EXPERIMENTS / "image_text.yaml"), "--config", str(folder / "tiny.yaml")]


def scores(words, folder, *more):
    """Return the test scores of a command line, logged to a new folder."""
    assert run(["test", *words, "--trainer.logger.init_args.save_dir", str(folder), *more]) == 0
    rows = read_metrics(folder / "run" / "a")
    return {name: value for row in rows for name, value in row.items() if name.startswith("test/")}


def error_of(*args):
    with pytest.raises(Exception) as caught:
        run([*args])
    meant = for_the_user(caught.value)
    assert meant is not None, f"not raised for the user: {caught.value!r}"
    return str(meant)


@pytest.mark.parametrize("method", ["vlpet", pytest.param("dora", marks=pytest.mark.slow)])
def test_a_run_exported_and_loaded_by_path_scores_the_same_under_another_seed(fitted, tmp_path, method, capsys):
    words, last = fitted(method)
    expected = scores(words, tmp_path / "first", "--ckpt_path", str(last))
    assert {"test/vqa/accuracy", "test/nlvr2/accuracy"} <= set(expected)
    assert run(["export", "--ckpt_path", str(last), "--out", str(tmp_path / "pet")]) == 0
    assert "pet_model.safetensors: 0." in capsys.readouterr().out
    again = scores(words, tmp_path / "again", "--model.pet_weights", str(tmp_path / "pet"), "--seed_everything", "7")
    assert again == expected
    other = scores(words, tmp_path / "other", "--ckpt_path", str(last), "--seed_everything", "7")
    assert other == expected


def test_an_export_tells_what_the_run_was(fitted, tmp_path, root):
    _, last = fitted("vlpet")
    run(["export", "--ckpt_path", str(last), "--out", str(tmp_path)])
    record = json.loads((tmp_path / "pet_config.json").read_text())
    assert "val/average" in record["metrics"]
    assert record["protocol"]["tasks"] == ["vqa", "nlvr2"]
    assert record["protocol"]["seed"] == 42
    assert record["protocol"]["lr"] == 0.01
    assert record["backbone"]["name"] == str(root / "backbone")
    assert "| val/average |" in (tmp_path / "README.md").read_text()
    saved = torch.load(last, weights_only=True)["state_dict"]
    held = load_file(tmp_path / "pet_model.safetensors")
    assert all(torch.equal(held[name.removeprefix("model.")], tensor) for name, tensor in saved.items())
    assert load_pet(tmp_path).injected


def test_lora_exports_merged_and_as_peft_has_it(fitted, tmp_path):
    words, last = fitted("lora")
    expected = scores(words, tmp_path / "first", "--ckpt_path", str(last))
    assert run(["export", "--ckpt_path", str(last), "--out", str(tmp_path / "whole"), "--merge"]) == 0
    overrides = ["--model.backbone", str(tmp_path / "whole"), "--model.pet_weights", str(tmp_path / "whole")]
    overrides += ["--model.placements", "[]", "--model.trainable", "[visual_embedding]"]
    assert scores(words, tmp_path / "again", *overrides) == pytest.approx(expected)
    assert run(["export", "--ckpt_path", str(last), "--out", str(tmp_path / "peft"), "--format", "peft"]) == 0
    assert len(load_file(tmp_path / "peft" / "adapter_model.safetensors")) == 8
    assert any("bias" in name for name in load_file(tmp_path / "peft" / "pet_model.safetensors"))


def test_a_trained_backbone_is_written_whole(fitted, tmp_path):
    words, last = fitted("full")
    assert run(["export", "--ckpt_path", str(last), "--out", str(tmp_path / "whole"), "--merge"]) == 0
    overrides = ["--model.backbone", str(tmp_path / "whole"), "--model.pet_weights", str(tmp_path / "whole")]
    loaded = scores(words, tmp_path / "again", *overrides, "--model.trainable", "[visual_embedding]")
    assert loaded == scores(words, tmp_path / "first", "--ckpt_path", str(last))


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("full", [], "this is not a PET export, which never holds the backbone"),
        ("vlpet", ["--format", "peft"], "peft has no format for VLPET"),
        ("vlpet", ["--merge"], "VLPET cannot be merged"),
        ("vlpet", ["--merge", "--format", "peft"], "--merge leaves no units"),
        ("vlpet", ["--task", "vqa"], "give it together with --merge"),
        (
            "vlpet",
            ["--ckpt_path", "nowhere/checkpoints/last.ckpt"],
            "no checkpoint at nowhere/checkpoints/last.ckpt: give a file",
        ),
        ("vlpet", ["--config", "nowhere.yaml"], "no config at 'nowhere.yaml'"),
        ("vlpet", ["--model.placements", "[]", "--model.trainable", "[visual_embedding]"], "is of another method"),
    ],
)
def test_what_cannot_be_exported_is_one_error_and_nothing_is_written(fitted, tmp_path, method, more, message):
    _, last = fitted(method)
    assert message in error_of("export", "--ckpt_path", str(last), "--out", str(tmp_path / "out"), *more)
    assert not (tmp_path / "out").exists()


def test_a_config_that_is_no_table_is_named(fitted, tmp_path):
    _, last = fitted("vlpet")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    words = ["export", "--ckpt_path", str(last), "--out", str(tmp_path / "out")]
    assert "list.yaml must be a mapping of settings by name" in error_of(
        *words, "--config", str(tmp_path / "list.yaml")
    )


def test_an_export_is_not_written_in_the_place_of_a_file(fitted, tmp_path):
    _, last = fitted("vlpet")
    (tmp_path / "out").write_text("mine")
    message = error_of("export", "--ckpt_path", str(last), "--out", str(tmp_path / "out"))
    assert message.endswith("out is a file: give a folder, or a name that is free")


def test_a_damaged_or_pickled_checkpoint_is_refused_without_running_it(fitted, tmp_path):
    words, _ = fitted("vlpet")
    (tmp_path / "bad.ckpt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    alone = error_of("export", "--ckpt_path", str(tmp_path / "bad.ckpt"), "--out", str(tmp_path / "out"))
    assert "no config.yaml at" in alone
    message = error_of("export", *words, "--ckpt_path", str(tmp_path / "bad.ckpt"), "--out", str(tmp_path / "out"))
    assert "cannot be read as a checkpoint of tensors and plain values" in message
    assert "no checkpoint at" in error_of(
        "export", *words, "--ckpt_path", "nowhere.ckpt", "--out", str(tmp_path / "out")
    )
