"""Python API: models from folders, files and runs, and batches from texts."""

from __future__ import annotations

import doctest
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

import vlpet_lightning as vl
from data_modules import ImageTextDataModule
from tests.data_modules.tiny_data import DIM, write_world
from tests.runs import quiet_trainer
from vlpet_lightning.__main__ import run
from vlpet_lightning.commands.params import report_of
from vlpet_lightning.pet import VLPET, Granularity, LargeGate, LoRA, LowRankProjector, ParallelAdapter, Placement
from vlpet_lightning.prediction_files import read_predictions

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
TEXTS = ["what color is the circle ?", "is it red or blue ?", "true false yes no", "a green thing .", "left right"]
NORMS = ["encoder.layer_norm", "decoder.layer_norm"]
RANK = 4
PET = Granularity(rank=RANK, value_rank=RANK)
IMAGE_TEXT = EXPERIMENTS / "image_text.yaml"


@pytest.fixture(scope="module", params=["bart", "mbart", "t5"])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vl.random_backbone(tmp_path_factory.mktemp(request.param), TEXTS, request.param, width=32)


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vl.random_backbone(tmp_path_factory.mktemp("backbone"), TEXTS, width=32)


def tiny(backbone: Path, placements: Any = PET, trainable: Any = None, **settings: Any) -> vl.VLModule:
    arguments = {"feature_dim": 16, "grid": None, "lr": 1e-2, **settings}
    return vl.build(backbone, placements, trainable, **arguments)


def colors(model: vl.VLModule) -> vl.Batch:
    features = torch.randn(4, 4, 16, generator=torch.Generator().manual_seed(0))
    return vl.make_batch(model, "gqa", ["what color is it ?"] * 4, features, ["red", "blue", "red", "blue"])


# build ---------------------------------------------------------------------------------------------------------------


def test_a_model_learns_in_a_plain_loop_on_either_backbone(backbone: Path) -> None:
    model = tiny(backbone, PET, ["pet", "visual_embedding", *NORMS], dropout=0.0)
    batch = colors(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-2)
    losses = []
    for _ in range(60):
        loss = model.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
    assert model.answer(batch) == ["red", "blue", "red", "blue"]


def test_the_same_model_learns_with_a_trainer(bart: Path, tmp_path: Path) -> None:
    model = tiny(bart)
    before = model.loss(colors(model)).item()
    trainer: Trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(model, DataLoader([colors(model)] * 30, batch_size=None))  # type: ignore[arg-type]
    assert trainer.global_step == 30
    assert model.loss(colors(model)).item() < before - 1


@pytest.mark.parametrize(
    "placements",
    [
        PET,
        [
            Placement(["encoder.attn", "encoder.ffn"], partial(VLPET, rank=RANK, gate=partial(LargeGate, rank=RANK))),
            Placement(["decoder.cross.value"], partial(ParallelAdapter, rank=RANK)),
        ],
        (
            Placement(["encoder.attn", "encoder.ffn"], VLPET.with_(rank=RANK, gate=LargeGate.with_(rank=RANK))),
            Placement("decoder.cross.value", ParallelAdapter.with_(rank=RANK)),
        ),
    ],
)
def test_placements_can_be_written_in_several_ways(placements: Any, bart: Path) -> None:
    model, first = tiny(bart, placements), tiny(bart)
    assert model.built().recipe == first.built().recipe
    assert torch.equal(model.eval()(colors(model)), first.eval()(colors(first)))


def test_units_are_trained_by_default_if_there_are_any(bart: Path) -> None:
    assert tiny(bart).rules == ["pet", "visual_embedding"]
    assert tiny(bart, None).rules == ["visual_embedding"]
    assert tiny(bart, trainable=["pet"]).rules == ["pet"]
    peft = {"class_path": "peft.LoraConfig", "init_args": {"target_modules": ["q_proj"]}}
    assert tiny(bart, None, peft=peft).rules == ["pet", "visual_embedding"]


def test_a_model_on_the_meta_device_is_counted_without_weights() -> None:
    lora = Placement("encoder.attn.query", LoRA.with_(rank=8))
    model = vl.build("facebook/bart-base", lora, ["pet"], device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert vl.count_parameters(model).trainable == 6 * 2 * 768 * 8
    with pytest.raises(ValueError, match="a model on the meta device has no weights"):
        vl.make_batch(model, "vqa", ["what ?"], torch.zeros(1, 36, 2048))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"placements": Placement("encoder.mlp", LoRA)}, "unknown site 'encoder.mlp' in placement 0: choose from"),
        ({"trainable": ["pets"]}, "unknown trainable rule 'pets'"),
        ({"feature_dmi": 3}, "VLBart has no setting 'feature_dmi': did you mean 'feature_dim'?"),
        ({"lr": -1.0}, "lr must be more than 0"),
    ],
)
def test_a_wrong_model_is_refused_in_one_sentence(arguments: dict[str, Any], words: str, bart: Path) -> None:
    with pytest.raises(ValueError) as refused:
        tiny(bart, **arguments)
    assert words in str(refused.value)


def test_another_kind_of_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="is a gpt2 model: give one of bart, mbart, t5"):
        vl.build(tmp_path)


# answers -------------------------------------------------------------------------------------------------------------


def test_answers_have_no_dropout_and_leave_every_module_in_its_mode(bart: Path) -> None:
    model = tiny(bart, dropout=0.9)
    model.train()
    model.built().visual.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    first = model.answer(colors(model), top=3)
    assert all(model.answer(colors(model), top=3) == first for _ in range(3))
    assert {name: module.training for name, module in model.named_modules()} == modes
    model.eval()
    assert model.answer(colors(model), top=3) == first
    assert [answer.text for answer, *_ in model.answer(colors(model), top=1)] == model.answer(colors(model))
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        model.answer(colors(model), top=0)


def test_a_module_returns_the_gates_of_its_model(bart: Path) -> None:
    model = tiny(bart).eval()
    batch = colors(model)
    logits, gates = model(batch, return_gates=True)
    assert torch.equal(logits, model(batch))
    sites = [("encoder.attn", 0), ("encoder.attn", 1), ("encoder.ffn", 0), ("encoder.ffn", 1)]
    assert sorted(gates.factors) == sites


# batches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["vqa", "gqa", "nlvr2", "caption"])
def test_a_batch_equals_that_of_the_data_module(task: str, tmp_path: Path, backbone: Path) -> None:
    write_world(tmp_path)
    data = ImageTextDataModule(str(tmp_path), str(backbone), tasks=[task], batch_size=3, token_cache=False)
    data.setup("fit")
    theirs: vl.Batch = next(iter(data.train_dataloader()))
    model = tiny(backbone, feature_dim=DIM)
    assert theirs.labels is not None
    answers = model.tokenizer.batch_decode(theirs.labels.clamp(min=0), skip_special_tokens=True)
    assert all(answers)
    ours = vl.make_batch(model, task, theirs.texts, theirs.features, answers)
    for name in ("input_ids", "text_mask", "features", "labels"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_targets_are_padded_with_labels_without_loss(bart: Path) -> None:
    model = tiny(bart)
    batch = vl.make_batch(model, "caption", ["", ""], torch.randn(2, 4, 16), ["red", "the red circle"])
    assert batch.labels is not None
    assert (batch.labels == -100).sum(dim=1).tolist() == [2, 0]
    assert model.tokenizer.decode(batch.labels[1]) == "<s> the red circle </s>"
    assert vl.make_batch(model, "caption", [""], torch.randn(1, 4, 16)).labels is None


def test_questions_and_answers_are_truncated_as_in_training(bart: Path) -> None:
    model = tiny(bart)
    batch = vl.make_batch(model, "vqa", ["red " * 50], torch.randn(1, 4, 16), ["blue " * 50])
    assert batch.labels is not None
    assert (batch.input_ids.shape[1], batch.labels.shape[1]) == (20, 10)


def test_a_prompt_replaces_the_original_one(bart: Path) -> None:
    model = tiny(bart)
    batch = vl.make_batch(model, "vqa", ["red"], torch.randn(1, 4, 16), prompt="is it ")
    assert model.tokenizer.batch_decode(batch.input_ids) == ["<s> is it red </s>"]


@pytest.mark.parametrize(
    ("task", "texts", "shape", "answers", "words"),
    [
        ("vqa", ["red", "blue"], (3, 4, 16), None, "got 2 texts, 3 features"),
        ("vqa", ["red"], (1, 4, 16), ["red", "blue"], "got 1 texts, 1 features, 2 answers"),
        ("vqa", [], (0, 4, 16), None, "at least one of each"),
        ("vqa", ["red"], (1, 4, 8), None, "features for vqa must have shape (B, F, 16), got (1, 4, 8)"),
        ("nlvr2", ["red"], (1, 4, 16), None, "features for nlvr2 must have shape (B, 2, F, 16), got (1, 4, 16)"),
        ("vqa", ["red"], (1, 2, 4, 16), None, "features for vqa must have shape (B, F, 16)"),
        ("vqa", ["red"], (1, 16), None, "features for vqa must have shape (B, F, 16)"),
        ("vqe", ["red"], (1, 4, 16), None, "unknown task 'vqe'"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(
    task: str, texts: list[str], shape: tuple[int, ...], answers: list[str] | None, words: str, bart: Path
) -> None:
    with pytest.raises(ValueError) as refused:
        vl.make_batch(tiny(bart, None), task, texts, torch.zeros(shape), answers)
    assert words in str(refused.value)


# config files --------------------------------------------------------------------------------------------------------


def test_config_files_count_as_the_command_does() -> None:
    configs = [IMAGE_TEXT, EXPERIMENTS / "pet" / "lora.yaml"]
    words = [word for path in configs for word in ("--config", str(path))]
    assert vl.count_parameters(vl.from_config(*configs, device="meta")) == report_of(words)


def test_settings_override_config_files(bart: Path) -> None:
    settings: dict[str, Any] = {"feature_dim": 16, "grid": None, "lr": 0.5, "backbone": bart}
    projector = partial(LowRankProjector, rank=2)
    model = vl.from_config(IMAGE_TEXT, placements=PET, trainable=["pet"], projector=projector, **settings)
    assert (model.lr, model.feature_dim, model.grid, model.rules) == (0.5, 16, None, ["pet"])
    same = tiny(bart, PET, ["pet"], projector=projector)
    assert model.built().recipe == same.built().recipe
    assert torch.equal(model.eval()(colors(model)), same.eval()(colors(same)))


@pytest.mark.parametrize(
    ("configs", "settings", "words"),
    [
        (["nothing.yaml"], {}, "no config file"),
        ([IMAGE_TEXT], {"lrate": 1}, "has no setting 'lrate'"),
        ([IMAGE_TEXT], {"lr": "high"}, "lr must be of type float, got high"),
        ([IMAGE_TEXT], {"lr": -1.0}, "lr must be more than 0"),
        ([IMAGE_TEXT], {"placements": Placement("encoder.mlp", LoRA)}, "unknown site 'encoder.mlp'"),
        ([IMAGE_TEXT], {"placements": Placement("encoder.ffn", lambda width: LoRA(width))}, "cannot be written"),
        ([], {}, "no model to run"),
    ],
)
def test_a_wrong_config_is_an_exception_and_not_the_end_of_the_process(
    configs: list[Path], settings: dict[str, Any], words: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(ValueError) as refused:
        vl.from_config(*configs, device="meta", **settings)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert capsys.readouterr() == ("", "")


# runs ----------------------------------------------------------------------------------------------------------------


class Finished(NamedTuple):
    """A finished run."""

    root: Path
    folder: Path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    words = [*TEXTS, "thing colour", "What is left ?"]
    vl.random_backbone(root / "backbone", words, width=32)
    overlay = {
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "logger": {
                "class_path": "vlpet_lightning.loggers.CSVLog",
                "init_args": {"save_dir": str(root), "name": "run", "version": "a"},
            },
            "callbacks": [
                {"class_path": "callbacks.PredictionWriter"},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"filename": "last", "enable_version_counter": False},
                },
            ],
        },
        "model": {"init_args": {"backbone": str(root / "backbone"), "feature_dim": DIM, "grid": 2, "lr": 0.02}},
        "data": {"init_args": {"root": str(root), "batch_size": 3, "tasks": ["vqa"]}},
    }
    (root / "tiny.yaml").write_text(yaml.safe_dump(overlay))
    found = Finished(root, root / "run" / "a")
    last = found.folder / "checkpoints" / "last.ckpt"
    arguments = ["--config", str(IMAGE_TEXT), "--config", str(root / "tiny.yaml"), "--seed_everything", "5"]
    assert run(["fit", *arguments]) == 0
    assert run(["test", *arguments, "--ckpt_path", str(last)]) == 0
    return found


def test_a_run_is_loaded_by_its_folder_and_answers_as_its_test_did(finished: Finished) -> None:
    model = vl.load_run(finished.folder)
    assert not model.training
    saved = torch.load(finished.folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert saved
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.own_state().items())
    data = ImageTextDataModule(str(finished.root), str(finished.root / "backbone"), tasks=["vqa"])
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    records = read_predictions(finished.folder / "predictions" / "test_vqa.json").records
    assert model.answer(batch) == [record["prediction"] for record in records]


def test_loading_a_run_leaves_the_seed_of_later_models_alone(finished: Finished, bart: Path) -> None:
    before = tiny(bart).own_state()
    vl.load_run(finished.folder)
    assert "PL_GLOBAL_SEED" not in os.environ
    after = tiny(bart).own_state()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_run_is_loaded_by_a_checkpoint_with_a_backbone_that_has_moved(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "a")
    shutil.move(finished.root / "backbone", tmp_path / "moved")
    try:
        with pytest.raises(FileNotFoundError, match="no pretrained model at"):
            vl.load_run(tmp_path / "a")
        model = vl.load_run(tmp_path / "a" / "checkpoints" / "last.ckpt", backbone=tmp_path / "moved")
    finally:
        shutil.move(tmp_path / "moved", finished.root / "backbone")
    same = vl.load_run(finished.folder).own_state()
    assert all(torch.equal(tensor, same[name]) for name, tensor in model.own_state().items())


def test_settings_of_another_method_are_refused(finished: Finished) -> None:
    with pytest.raises(ValueError, match="this checkpoint is of another method"):
        vl.load_run(finished.folder, placements=PET)


def test_a_run_is_loaded_under_its_own_seed(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    configure = vl.VLModule.configure_model

    def recorded(module: vl.VLModule) -> None:
        seeds.append(os.environ.get("PL_GLOBAL_SEED"))
        configure(module)

    monkeypatch.setattr(vl.VLModule, "configure_model", recorded)
    vl.load_run(finished.folder)
    monkeypatch.setenv("PL_GLOBAL_SEED", "9")
    vl.load_run(finished.folder)
    assert seeds == ["5", "9"]
    assert os.environ["PL_GLOBAL_SEED"] == "9"


def test_the_last_of_several_checkpoints_is_loaded(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "a")
    (tmp_path / "a" / "checkpoints" / "best-1.ckpt").write_text("not read")
    ours, theirs = vl.load_run(tmp_path / "a").own_state(), vl.load_run(finished.folder).own_state()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_without_a_last_checkpoint_the_only_one_is_loaded(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "a")
    checkpoints = tmp_path / "a" / "checkpoints"
    (checkpoints / "last.ckpt").rename(checkpoints / "best-1.ckpt")
    assert vl.load_run(tmp_path / "a").own_state().keys() == vl.load_run(finished.folder).own_state().keys()
    shutil.copyfile(checkpoints / "best-1.ckpt", checkpoints / "best-0.ckpt")
    with pytest.raises(FileNotFoundError, match=r"no last.ckpt in .*: give one of best-0.ckpt, best-1.ckpt"):
        vl.load_run(tmp_path / "a")
    (tmp_path / "a" / "config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config.yaml at .*config.yaml, where fit writes the settings"):
        vl.load_run(checkpoints / "best-0.ckpt")


def test_the_example_of_load_run_holds(finished: Finished, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    text = (vl.load_run.__doc__ or "").replace("# doctest: +SKIP", "")
    example = doctest.DocTestParser().get_doctest(text, {"folder": finished.folder}, "load_run", None, None)
    assert doctest.DocTestRunner().run(example) == (0, 3)


# small backbones -----------------------------------------------------------------------------------------------------


def test_a_random_backbone_depends_on_its_seed_alone_and_is_replaced(tmp_path: Path) -> None:
    def weights(**settings: Any) -> bytes:
        torch.rand(3)
        folder = vl.random_backbone(tmp_path / "backbone", TEXTS, width=16, layers=1, heads=2, **settings)
        return (folder / "model.safetensors").read_bytes()

    first = weights()
    assert weights() == first
    assert weights(seed=1) != first


def test_a_random_backbone_overwrites_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="holds something else than a backbone"):
        vl.random_backbone(tmp_path, TEXTS)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"kind": "gpt"}, "kind must be one of bart, mbart, t5"), ({"width": 30}, "4 heads do not divide a width of 30")],
)
def test_a_random_backbone_of_wrong_size_is_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        vl.random_backbone(tmp_path / "backbone", TEXTS, **settings)
    assert words in str(refused.value)
    assert not (tmp_path / "backbone").exists()
