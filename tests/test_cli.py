"""The command line: runs from config files on a tiny data root, and errors."""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.rank_zero import rank_zero_only

from tests.data_modules.tiny_data import DIM, write_world
from vlpet_lightning.__main__ import for_the_user, run
from vlpet_lightning.backbones import load_tokenizer
from vlpet_lightning.cli import module_from_config
from vlpet_lightning.loggers import read_metrics
from vlpet_lightning.prediction_files import read_predictions
from vlpet_lightning.run.config_match import OtherRun, check_same
from vlpet_lightning.run.resume import announce, resolve

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_backbone):
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    shutil.copytree(tiny_backbone, root / "backbone")
    return root


@pytest.fixture
def words(root, tmp_path):
    return words_in(root, tmp_path)


def words_in(root, tmp_path):
    """Return the arguments of ``fit`` on the tiny root: the shipped config with a small overlay."""
    logger = {"class_path": "vlpet_lightning.loggers.CSVLog", "init_args": {"save_dir": str(tmp_path), "name": "run"}}
    logger["init_args"]["version"] = "a"
    overlay = {
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "logger": logger, "enable_progress_bar": False},
        "model": {"init_args": {"backbone": str(root / "backbone"), "feature_dim": DIM, "grid": 2}},
        "data": {"init_args": {"root": str(root), "batch_size": 3}},
    }
    overlay["trainer"]["log_every_n_steps"] = 1
    overlay["trainer"]["callbacks"] = [
        callback
        for callback in yaml.safe_load((EXPERIMENTS / "image_text.yaml").read_text())["trainer"]["callbacks"]
        if "ProgressBar" not in callback["class_path"]
    ]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(overlay))
    return ["--config", str(EXPERIMENTS / "image_text.yaml"), "--config", str(tmp_path / "tiny.yaml")]


def error_of(*args):
    """Return the only message that a user would see."""
    with pytest.raises(Exception) as caught:  # any type of error
        run([*args])
    meant = for_the_user(caught.value)
    assert meant is not None, f"not raised for the user: {caught.value!r}"
    return str(meant)


def test_fit_test_and_predict_of_the_shipped_config(words, tmp_path):
    assert run(["fit", *words, "--trainer.max_epochs=1"]) == 0
    folder = tmp_path / "run" / "a"
    last = folder / "checkpoints" / "last.ckpt"
    assert run(["test", *words, "--ckpt_path", str(last)]) == 0
    rows = read_metrics(folder)
    logged = set().union(*rows)
    assert {"val/average", "val/caption/cider", "test/vqa/accuracy", "test/caption/meteor"} <= logged
    # the rows of the fit are kept
    assert {"train/nlvr2/loss", "parameters/trainable", "batch/vqa", "lr-HFAdamW/pg1"} <= logged
    test = {name: row[name] for row in rows for name in row if name.startswith("test/")}
    mains = ("vqa/accuracy_original", "gqa/accuracy", "nlvr2/accuracy", "caption/cider")
    assert test["test/average"] == pytest.approx(sum(test[f"test/{name}"] for name in mains) / 4)
    assert run(["predict", *words, "--ckpt_path", str(last)]) == 0
    written = read_predictions(folder / "predictions" / "predict_nlvr2.json").records
    assert {entry["prediction"] for entry in written} <= {"true", "false"}
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["feature_dim"] == DIM


def test_what_is_tested_goes_into_the_folder_of_its_run_whose_config_serves_every_verb(words, tmp_path, capsys):
    overlay = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    for callback in overlay["trainer"]["callbacks"]:
        if callback["class_path"] == "callbacks.CaptionMetrics":
            callback["init_args"]["metrics"] = ["cider"]  # METEOR takes most of the time
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(overlay))
    steps = ["--trainer.max_epochs=1", "--trainer.limit_val_batches=0", "--trainer.logger.init_args.version=null"]
    run(["fit", *words, *steps, "--model.lr=0.25"])
    folder = tmp_path / "run" / "version_0"
    config, last = folder / "config.yaml", folder / "checkpoints" / "last.ckpt"
    before = config.read_text()
    run(["test", *words, *steps, "--ckpt_path", str(last)])
    assert config.read_text() == before
    assert yaml.safe_load((folder / "test.yaml").read_text())["ckpt_path"] == str(last)
    assert (folder / "predictions" / "test_vqa.json").is_file()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["version_0"]
    run(["report", "--runs", f"[{folder}]", "--out", str(tmp_path / "report")])
    run(["export", "--ckpt_path", str(last), "--out", str(tmp_path / "export")])
    assert "test/average" in json.loads((tmp_path / "export" / "pet_config.json").read_text())["metrics"]
    capsys.readouterr()
    run(["params", "--config", str(config)])
    assert "trainable" in capsys.readouterr().out
    run(["data", "check", "--config", str(config)])
    assert "ready" in capsys.readouterr().out


def test_a_training_does_not_begin_in_the_folder_of_another(words, tmp_path):
    steps = ["--trainer.max_epochs=1", "--trainer.limit_val_batches=0", "--trainer.limit_train_batches=2"]
    run(["fit", *words, *steps])
    folder = tmp_path / "run" / "a"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert f"{folder} already holds a run: resume it by" in error_of("fit", *words, *steps, "--model.lr=0.5")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert run(["fit", *words, *steps, "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]) == 0


def test_scoring_an_untrained_model_is_said(words):
    with pytest.warns(UserWarning, match="what is scored is the model before any training"):
        run(["validate", *words, "--trainer.limit_val_batches=1"])


def test_the_command_line_beats_what_a_checkpoint_was_trained_with(words, tmp_path):
    words = [*words, "--trainer.limit_val_batches=0"]
    run(["fit", *words, "--trainer.max_epochs=1", "--model.lr=1e-3"])
    last = str(tmp_path / "run" / "a" / "checkpoints" / "last.ckpt")
    run(["fit", *words, "--model.lr=0.5", "--model.warmup_ratio=0", "--ckpt_path", last])
    rates = [row["lr-HFAdamW/pg1"] for row in read_metrics(tmp_path / "run" / "a") if "lr-HFAdamW/pg1" in row]
    assert max(rates[:19]) <= 1e-3  # 19 batches per epoch
    assert rates[19] == pytest.approx(0.5 * 19 / 38)
    saved = torch.load(last, weights_only=True)
    assert saved["lr_schedulers"][0]["base_lrs"] == [0.5, 0.5]
    assert {group["initial_lr"] for group in saved["optimizer_states"][0]["param_groups"]} == {0.5}


OVERLAYS = [
    path
    for folder in ("pet", "protocol")
    for path in sorted((EXPERIMENTS / folder).glob("*.yaml"))
    if not path.stem.endswith("_video")  # for the video-text tasks, see tests/data_modules/test_video_text.py
]


# one overlay or two of each method; tests/commands/test_counts.py builds the model of every overlay
FITTED = {
    *("vlpet_large", "vlpet_small_t5", "vl_adapter", "vl_adapter_half_shared", "lora_multiple", "compacter", "dora"),
    *("hyperformer", "lst_t5", "prompt_tuning", "ia3", "full", "bitfit", "hf_vera"),
}


@pytest.mark.parametrize(
    "overlay",
    [
        pytest.param(
            path,
            id=f"{path.parent.name}-{path.stem}",
            marks=[] if path.stem in FITTED or path.parent.name == "protocol" else pytest.mark.slow,
        )
        for path in OVERLAYS
    ],
)
def test_overlays_of_methods_and_protocols_fit(words, tiny_t5, overlay):
    if overlay.stem.startswith("hf_"):
        pytest.importorskip("peft", reason="methods of Hugging Face peft need the extra")
    image_text, tiny = words[:2], words[2:]
    t5 = ["--config", str(EXPERIMENTS / "backbone" / "t5_base.yaml"), *tiny, "--model.backbone", str(tiny_t5)]
    steps = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0", "--trainer.max_epochs=1"]
    quick = ["--trainer.callbacks=[]", "--trainer.enable_checkpointing=false"]
    backbone = t5 if overlay.stem.endswith("_t5") else tiny
    assert run(["fit", *image_text, *backbone, "--config", str(overlay), *steps, *quick]) == 0


def test_a_backbones_overlay_keeps_what_the_experiment_says():
    names = ["image_text", "backbone/t5_base", "pet/vlpet_small_t5"]
    module = module_from_config([word for name in names for word in ("--config", str(EXPERIMENTS / f"{name}.yaml"))])
    assert (type(module).__name__, module.backbone_name, module.lr) == ("VLT5", "t5-base", 3e-4)
    assert (module.feature_dim, module.grid, module.weight_decay, module.warmup_ratio) == (2048, 6, 0.01, 0.1)
    assert module.placements[0].unit(32).branch_scale == 0.3


def test_without_data_one_error_says_what_is_missing_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = error_of("fit", "--config", str(EXPERIMENTS / "image_text.yaml"))
    assert "no annotation file vqa/karpathy_train.json below data/image_text" in message
    assert "data synthetic" in message
    assert "data download" in message
    assert not list(tmp_path.iterdir())


def test_missing_weights_are_named_after_the_data_was_found(words, root):
    shutil.copytree(root / "backbone", root / "no_weights", ignore=shutil.ignore_patterns("*.safetensors"))
    message = error_of("fit", *words, "--model.backbone", str(root / "no_weights"))
    assert "no pretrained weights at" in message
    assert "give a folder with model.safetensors" in message
    assert "hf download" not in message  # not on the Hub


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]"])
def test_a_damaged_file_of_a_backbone_is_named(words, root, tmp_path, name, content):
    folder = shutil.copytree(root / "backbone", tmp_path / "backbone")
    (folder / name).write_bytes(content)
    message = error_of("fit", *words, "--model.backbone", str(folder), "--model.placements=[]")
    assert message.startswith(str(folder / name))
    assert message.endswith("copy it again from its source, or make the backbone again")
    assert "\n" not in message


def test_weights_that_were_cut_short_are_named(words, root, tmp_path):
    folder = shutil.copytree(root / "backbone", tmp_path / "backbone")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = error_of("fit", *words, "--model.backbone", str(folder))
    assert message.startswith(f"{weights} is damaged or cut short (SafetensorError: ")


@pytest.mark.parametrize(
    ("name", "on_the_hub"),
    [("/no/such", False), ("./none", False), ("a/b/c", False), ("no/such", True), ("none", True)],
)
def test_only_a_name_that_the_hub_may_know_is_fetched_from_it(name, on_the_hub):
    with pytest.raises(FileNotFoundError, match=f"no tokenizer at '{name}': give a folder with tokenizer") as error:
        load_tokenizer(name)
    assert (f"hf download {name}" in str(error.value)) is on_the_hub


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--data.tasks=[vqa,gqua]", "unknown task 'gqua': choose from"),
        ("--model.trainable=[pets]", "unknown trainable rule 'pets': choose from all, bias"),
        ("--model.placements=[{at: [encoder.atn], unit: vlpet_lightning.pet.VLPET}]", "unknown site 'encoder.atn'"),
        ("--model.feature_dim=2048", "are 8 wide, the model expects 2048"),
        (
            "--model.placements=[{at: [encoder.ffn], unit: {class_path: vlpet_lightning.pet.HyperFormer, "
            "init_args: {tasks: [vqa, gqa], rank: 4}}}]",
            "HyperFormer at site 'encoder.ffn' has parts for vqa, gqa alone, the data has nlvr2, caption too",
        ),
        ("--model.lr=-1", "lr must be more than 0, and finite, got -1.0"),
        ("--model.lr=0", "lr must be more than 0, and finite, got 0"),
        ("--model.weight_decay=-1", "weight_decay must be at least 0, got -1.0"),
        ("--model.warmup_ratio=-1", "warmup_ratio must be between 0 and 1, got -1.0"),
        ("--model.warmup_ratio=3", "warmup_ratio must be between 0 and 1, got 3.0"),
        ("--model.dropout=2", "dropout must be between 0 and 1, got 2.0"),
        ("--model.feature_dim=-1", "feature_dim must be at least 1, got -1"),
        ("--data.init_args.num_workers=-1", "num_workers must be at least 0, got -1"),
        ("--trainer.max_epochs=-3", "trainer.max_epochs must be 0 or more, or -1 for no limit, got -3"),
        ("--trainer.gradient_clip_val=-5", "trainer.gradient_clip_val must be 0 or more, or null for no limit, got -5"),
        ("--model.placements=[]", "rule 'pet' matches no parameter of this model: remove it, or add a placement"),
    ],
)
def test_a_wrong_value_is_one_error(words, override, message):
    assert message in error_of("fit", *words, override)


UNIT = "{at: [encoder.attn], unit: {class_path: vlpet_lightning.pet.VLPET, init_args: {rnk: 9}}}"


@pytest.mark.parametrize(
    ("typo", "message"),
    [
        ("model: {init_args: {lerning_rate: 1}}", "vlpet_lightning.VLBart has no setting 'lerning_rate'"),
        (
            "model: {init_args: {warmup_rate: 1}}",
            "no setting 'warmup_rate': did you mean 'warmup_ratio'? it has backbone,",
        ),
        (
            f"model: {{init_args: {{placements: [{UNIT}]}}}}",
            "vlpet_lightning.pet.VLPET has no setting 'rnk': did you mean",
        ),
        (
            "data: {init_args: {batchsize: 3}}",
            "data_modules.ImageTextDataModule has no setting 'batchsize': did you mean",
        ),
        ("trainer: {max_epoch: 3}", "trainer has no setting 'max_epoch': did you mean 'max_epochs'?"),
        ("trainr: {max_epochs: 3}", "a config has no setting 'trainr': did you mean 'trainer'?"),
        ("model: {init_args: {lr: fast}}", "lr must be of type float, got fast"),
        ("model: {init_args: {grid: six}}", "grid must be of type int, or null, got six"),
        (
            "model: {init_args: {trainable: [pet, {a: 1}]}}",
            "each element of trainable must be of type str, got {'a': 1}\n",
        ),
        ("data: {init_args: {tasks: [vqa, [3]]}}", "each element of tasks must be of type str, got [3]\n"),
        (
            "data: {init_args: {batch_sizes: {vqa: many}}}",
            "each element of batch_sizes must be of type int, got many\n",
        ),
        ("model: {init_args: {placements: [3]}}", "each element of placements must be a Placement, with"),
        ("trainer: {callbacks: [3]}", "each element of trainer.callbacks must be a Callback, with"),
        ("model: {init_args: {trainable: pet}}", "trainable must be a list, or null, got pet: write [pet]\n"),
        ("model: {init_args: {no_decay: bias}}", "no_decay must be a list, or null, got bias: write [bias]\n"),
        ("model: {init_args: {placements: pet}}", "placements must be a list, or null, got pet\n"),
        ("data: {init_args: {batch_sizes: 3}}", "batch_sizes must be a mapping of names to values, or null, got 3\n"),
        ("model: {init_args: {start: identiy}}", "start must be one of 'original', 'identity', got identiy"),
        ("model: {init_args: {no_decay: [bais]}}", "no_decay must be one of 'bias', 'norm', 'gate'"),
        ("model: {class_path: vlpet_lightning.VLBrt}", "vlpet_lightning has no 'VLBrt': did you mean 'VLBart'?"),
        (
            "model: {init_args: {placements: [{at: [encoder.ffn], unit: {class_path: vlpet_lightning.pet.VLPETT}}]}}",
            "vlpet_lightning.pet has no 'VLPETT': did you mean 'VLPET'? it has IA3",
        ),
        (
            "model: {init_args: {placements: [{at: [encoder.ffn], "
            "unit: {class_path: vlpet_lightning.pet.VLPET, init_args: {split: dwn}}}]}}",
            "split must be one of 'down', 'up', 'both', 'pairs', got dwn\n",
        ),
        (
            "model: {init_args: {placements: [{at: [encoder.ffn], "
            "unit: {class_path: vlpet_lightning.pet.HyperFormer}}]}}",
            "vlpet_lightning.pet.HyperFormer needs tasks: give it in init_args",
        ),
    ],
)
def test_a_misspelt_key_or_wrong_value_in_a_config_is_one_sentence(words, tmp_path, capsys, typo, message):
    (tmp_path / "typo.yaml").write_text(typo + "\n")
    with pytest.raises(SystemExit):
        run(["fit", *words, "--config", str(tmp_path / "typo.yaml")])
    printed = capsys.readouterr().err
    assert message in printed.split("error: ")[1]
    assert len(printed.splitlines()) < 5
    assert "(all settings: python -m vlpet_lightning" in printed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no model to run: give a config, such as --config experiments/image_text.yaml"),
        (["--config", "none.yaml"], "no config file .*none.yaml: look in experiments"),
        (["--config", "."], "no config file "),
    ],
)
def test_a_config_that_is_none_is_one_sentence(tmp_path, monkeypatch, capsys, given, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run(["fit", *given])
    assert re.search(message, capsys.readouterr().err)


def test_a_checkpoint_of_another_method_is_one_error(begun, tmp_path):
    last = str(tmp_path / "run" / "a" / "checkpoints" / "last.ckpt")
    small = ["--config", str(EXPERIMENTS / "pet" / "vlpet_small.yaml")]
    assert "checkpoint is of another method" in error_of("test", *begun, *small, "--ckpt_path", last)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_what_does_not_resume_is_told_how_to_name_its_checkpoint(words, tmp_path, verb):
    message = error_of(verb, *words, "--ckpt_path", "auto")
    assert f"--ckpt_path auto is for fit, which resumes from it: give {verb} the checkpoint itself" in message
    assert message.endswith(f"such as {tmp_path}/run/a/checkpoints/last.ckpt")


@pytest.mark.parametrize("verb", ["fit", "test"])
def test_a_checkpoint_that_is_not_there_is_named_before_data_is_read(words, tmp_path, verb):
    nowhere = [*words, "--data.init_args.root", str(tmp_path / "nowhere")]
    message = error_of(verb, *nowhere, "--ckpt_path", str(tmp_path / "lost.ckpt"))
    assert message == f"no checkpoint {tmp_path}/lost.ckpt: see checkpoints in the folder of the run"
    (tmp_path / "best.ckpt").touch()
    assert error_of(verb, *nowhere, "--ckpt_path", str(tmp_path / "lost.ckpt")).endswith("its folder has best.ckpt")


def test_auto_needs_a_logger_with_a_folder_and_lets_others_be(words, monkeypatch):
    monkeypatch.setenv("VLPET_RUN", "mine")
    auto = [*words, "--ckpt_path", "auto", "--data.init_args.root", "nowhere"]
    flow = "lightning.pytorch.loggers.MLFlowLogger"
    assert "MLFlowLogger has none that is named by save_dir" in error_of("fit", *auto, "--trainer.logger", flow)
    loggers = [Namespace(class_path=flow, init_args=Namespace(experiment_name="a", save_dir="b"))]
    loggers.insert(0, Namespace(class_path="CSVLog", init_args=Namespace(save_dir="b", name="c", version=None)))
    resolve(Namespace(trainer=Namespace(logger=loggers), ckpt_path="auto"))
    assert loggers[0].init_args.version == "mine"
    assert "version" not in loggers[1].init_args


SHORT = ["--ckpt_path", "auto", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
SHORT += ["--trainer.limit_val_batches=0"]
KEEP = "lightning.pytorch.callbacks.ModelCheckpoint"


def only(folder, **settings):
    """Return arguments for a run with one ModelCheckpoint and no other callback."""
    file = folder / "keep.yaml"
    file.write_text(yaml.safe_dump({"trainer": {"callbacks": [{"class_path": KEEP, "init_args": settings}]}}))
    return ["--config", str(file)]


def test_auto_says_whether_a_run_begins_or_resumes(words, tmp_path, capsys):
    checkpoints = tmp_path / "run" / "a" / "checkpoints"
    assert run(["fit", *words, *only(tmp_path, save_last=True), *SHORT]) == 0
    assert f"begins: no resume.ckpt or last.ckpt in {checkpoints}\n" in capsys.readouterr().err
    assert run(["fit", *words, *only(tmp_path, save_last=True), *SHORT]) == 0
    assert f"resumes from {checkpoints}/last.ckpt\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "version", "folder"),
    [
        ("run", "b", "b"),
        ("null", "3", "version_3"),
        *(
            pytest.param(*others, marks=pytest.mark.slow)
            for others in (("null", "b", "b"), ("", "b", "b"), ("", "3", "version_3"), ("run", "3", "version_3"))
        ),
    ],
)
def test_auto_looks_where_the_first_logger_writes(words, tmp_path, capsys, name, version, folder):
    logger = [f"--trainer.logger.init_args.name={name}", f"--trainer.logger.init_args.version={version}"]
    checkpoints = tmp_path / ("run" if name == "run" else "") / folder / "checkpoints"
    assert run(["fit", *words, *only(tmp_path, save_last=True), *logger, *SHORT]) == 0
    assert (checkpoints / "last.ckpt").is_file()
    capsys.readouterr()
    assert run(["fit", *words, *only(tmp_path, save_last=True), *logger, *SHORT]) == 0
    assert f"resumes from {checkpoints}/last.ckpt\n" in capsys.readouterr().err


def once(words, tmp_path, *more):
    """Train two steps, or resume, with as few callbacks as possible."""
    return ["fit", *words, *only(tmp_path, save_last=True), *SHORT, *more]


@pytest.fixture(scope="module")
def short_run(root, tmp_path_factory):
    """Train once for all tests that need a run with a checkpoint."""
    folder = tmp_path_factory.mktemp("short")
    assert run(once(words_in(root, folder), folder)) == 0
    return folder / "run"


@pytest.fixture
def begun(words, tmp_path, short_run):
    """Return the arguments of a run that has a checkpoint."""
    shutil.copytree(short_run, tmp_path / "run")
    return words


@pytest.mark.parametrize(
    ("changes", "differences"),
    [
        (["--seed_everything=2"], "seed_everything: 42 there, 2 here. Give"),
        (
            ["--data.init_args.tasks=[vqa]"],
            "data.init_args.tasks: ['vqa', 'gqa', 'nlvr2', 'caption'] there, ['vqa'] here",
        ),
        (
            ["--seed_everything=2", "--model.init_args.lr=0.5", "--model.dropout=0", "--model.weight_decay=0"],
            "seed_everything: 42 there, 2 here; model.init_args.dropout: 0.1 there, 0.0 here; "
            "model.init_args.lr: 0.001 there, 0.5 here; and 1 more. Give",
        ),
        (
            ["--config", str(EXPERIMENTS / "pet" / "vlpet_small.yaml")],
            "vlpet_lightning.pet.LargeGate there, vlpet_lightning.pet.SmallGate here",
        ),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (["--model.init_args.lr=0.5"], "model.init_args.lr: 0.001 there, 0.5 here. Give"),
                (["--data.init_args.batch_size=4"], "data.init_args.batch_size: 3 there, 4 here. Give"),
                (
                    ["--data.init_args.batch_sizes={vqa: 4}"],
                    "data.init_args.batch_sizes: null there, {'vqa': 4} here. Give",
                ),
                (["--model.init_args.mask_padding=true"], "model.init_args.mask_padding: False there, True here. Give"),
                (
                    ["--model.init_args.optimizer=torch.optim.SGD"],
                    "vlpet_lightning.optim.HFAdamW there, torch.optim.SGD here",
                ),
            )
        ),
    ],
)
def test_auto_refuses_to_go_on_with_a_run_of_another_config(begun, tmp_path, changes, differences):
    home = tmp_path / "run" / "a"
    before = (home / "config.yaml").read_text()
    message = error_of(*once(begun, tmp_path, *changes))
    assert message.startswith(f"{home} is a run of another config: ")
    assert differences in message
    cure = f"another name (VLPET_RUN), or resume it with other settings by --ckpt_path {home}/checkpoints/last.ckpt"
    assert message.endswith(cure)
    assert (home / "config.yaml").read_text() == before


def test_auto_resumes_where_a_start_differs_in_what_makes_no_other_run(begun, root, tmp_path, capsys):
    resumes = f"resumes from {tmp_path}/run/a/checkpoints/last.ckpt"
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    shutil.move(copy / "features", tmp_path / "moved")
    (tmp_path / "over.yaml").write_text(yaml.safe_dump({"overlays": [begun[1]], "trainer": {"max_epochs": 3}}))
    read = [f"--data.init_args.root={copy}", f"--data.init_args.features={tmp_path / 'moved'}"]
    read += ["--data.init_args.num_workers=1", "--data.init_args.bank=ram", "--data.init_args.token_cache=false"]
    same = [f"--model.init_args.backbone={os.path.relpath(root / 'backbone')}", "--model.init_args.no_decay=[bias]"]
    same += ["--data.init_args.prompts={}"]
    length = ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=7", "--trainer.callbacks+=callbacks.Preemption"]
    for changes in (read, same, length, ["--config", str(tmp_path / "over.yaml"), *begun[2:]]):
        capsys.readouterr()
        assert run(once(begun, tmp_path, *changes)) == 0
        assert resumes in capsys.readouterr().err


def test_auto_resumes_where_every_start_draws_its_seed(words, tmp_path, capsys, monkeypatch):
    for seed in ("7", "8"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)  # as if initialised
        assert run(once(words, tmp_path, "--seed_everything=true")) == 0
    assert "resumes from" in capsys.readouterr().err


def test_an_explicit_checkpoint_is_gone_on_from_with_other_settings(begun, tmp_path):
    last = str(tmp_path / "run" / "a" / "checkpoints" / "last.ckpt")
    words = once(begun, tmp_path, "--seed_everything=2", "--model.init_args.lr=0.5", "--ckpt_path", last)
    assert run(words) == 0


@pytest.mark.parametrize("text", ["", "model: {", "[1]", "seed_everything: 42\n", None])
def test_a_config_that_cannot_be_read_stops_no_run(tmp_path, text):
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    check_same(tmp_path, {"seed_everything": 42, "model": {"class_path": "A"}}, "")


@pytest.mark.parametrize(
    ("there", "here", "same"),
    [
        ("data/demo/backbone", "/home/me/data/demo/backbone", True),
        ("/models/t5-base", "t5-base", True),  # downloaded since
        ("./backbone", "backbone", True),
        ("/a/backbone", "/b/backbone", True),  # copied to another disk, and removed from the first
        ("/a/backbone", "/a/other", False),
        ("/usr/lib", "/usr/local/lib", False),
        ("/models/t5-base", "base", False),
        ("a", "b", False),
        (1, 1.0, True),
        (0, False, False),
        (None, [], True),
        (None, 0, False),
    ],
)
def test_settings_are_compared_by_what_they_mean(tmp_path, there, here, same):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"x": there, "older": 1}}}))
    with nullcontext() if same else pytest.raises(OtherRun, match=r"model\.init_args\.x: .* there, .* here"):
        check_same(tmp_path, {"model": {"init_args": {"x": here, "newer": 1}}}, "")


def test_auto_warns_of_checkpoints_that_it_does_not_go_on_from(words, tmp_path):
    best = only(tmp_path, filename="best")
    assert run(["fit", *words, *best, *SHORT]) == 0
    with pytest.warns(UserWarning, match=r"checkpoints has best.ckpt, from which .* not resume.ckpt or last.ckpt"):
        run(["fit", *words, *best, *SHORT])


def test_auto_refuses_checkpoints_that_go_elsewhere_and_lets_copies_be(words, tmp_path, capsys):
    elsewhere = {"dirpath": str(tmp_path / "kept"), "save_last": True}
    message = error_of("fit", *words, *only(tmp_path, **elsewhere), *SHORT)
    assert f"looks into {tmp_path}/run/a/checkpoints, and a ModelCheckpoint of trainer.callbacks" in message
    assert f"has the dirpath {tmp_path}/kept, which all runs would share: leave dirpath out" in message
    assert not (tmp_path / "run").exists()
    added = [
        f"--trainer.callbacks+={KEEP}",
        "--trainer.callbacks.filename=resume",
        "--trainer.callbacks.every_n_train_steps=1",
    ]
    assert run(["fit", *words, *only(tmp_path, **elsewhere), *added, *SHORT]) == 0
    home = {"dirpath": str(tmp_path / "run" / "a" / "checkpoints"), "save_last": True}
    assert run(["fit", *words, *only(tmp_path, **home), *SHORT]) == 0


def test_other_ranks_leave_it_to_the_first_to_say(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    announce(tmp_path, None)
    assert capsys.readouterr().err == ""


def test_an_unknown_verb_lists_the_valid_ones(capsys):
    assert run(["train"]) == 2
    printed = capsys.readouterr().err
    assert "unknown verb 'train'" in printed
    assert "data synthetic" in printed


@pytest.mark.parametrize("words", [["data", "--help"], ["data", "-h"], ["data"]])
def test_help_of_several_verbs_lists_these(words, capsys):
    assert run(words) == 0
    printed = capsys.readouterr().out
    assert "data extract images" in printed
    assert "unknown verb" not in printed
    assert "pretrain " not in printed


def test_a_misspelt_verb_has_a_guess(capsys):
    assert run(["data", "chek", "--config", "x"]) == 2
    assert "did you mean 'data check'?" in capsys.readouterr().err
    assert run(["fitt"]) == 2
    assert "did you mean 'fit'?" in capsys.readouterr().err


def test_options_are_not_abbreviated(capsys):
    with pytest.raises(SystemExit):
        run(["data", "verify", "--stor", "x"])
    printed = capsys.readouterr().err
    assert "unrecognized arguments: --stor" in printed
    assert "python -m vlpet_lightning data verify --help" in printed


def test_help_lists_every_verb(capsys):
    assert run([]) == 0
    printed = capsys.readouterr().out
    assert all(verb in printed for verb in ("fit", "params", "data extract images", "report"))


@pytest.mark.parametrize("overlays", [["demo"], ["demo", "nlvr1"]])
def test_shipped_overlays_are_whole(overlays):
    configs = [word for name in ["image_text", *overlays] for word in ("--config", str(EXPERIMENTS / f"{name}.yaml"))]
    module = module_from_config(configs)
    assert module.backbone_name == f"data/{overlays[-1]}/backbone"
    assert [site for placement in module.placements for site in placement.at] == [
        "encoder.attn",
        "encoder.ffn",
        "decoder.cross.value",
    ]
