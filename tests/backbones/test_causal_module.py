"""``VLCausal`` from the command line: training, testing, checkpoints, exports and parameter counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tests.backbones.tiny_vlm import save_smolvlm
from tests.data_modules.tiny_data import write_world
from vlpet_lightning import VLCausal, load_pet
from vlpet_lightning.__main__ import run
from vlpet_lightning.api import make_batch
from vlpet_lightning.backbones import BACKBONES, load_tokenizer
from vlpet_lightning.backbones.image_processor import load_image_processor
from vlpet_lightning.backbones.template import chat_prompt
from vlpet_lightning.loggers import read_metrics
from vlpet_lightning.pet import LoRA, Placement
from vlpet_lightning.protocol import file_of, read_record

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
UNIT = {"class_path": "vlpet_lightning.pet.LoRA", "init_args": {"rank": 4}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_smolvlm(tmp_path_factory.mktemp("smolvlm"))


@pytest.fixture(scope="module")
def words(folder, tmp_path_factory):
    """Arguments of a small run."""
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    callbacks = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}},
        {"class_path": "callbacks.VQAMetrics"},
        {"class_path": "callbacks.CaptionMetrics"},
    ]
    logger = {"save_dir": str(root), "name": "run", "version": "a"}
    overlay = {
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "precision": "32-true",
            "log_every_n_steps": 1,
            "logger": {"class_path": "vlpet_lightning.loggers.CSVLog", "init_args": logger},
            "callbacks": callbacks,
            "enable_progress_bar": False,
        },
        "model": {
            "class_path": "vlpet_lightning.VLCausal",
            "init_args": {
                "backbone": str(folder),
                "placements": [{"at": ["decoder.attn.query", "decoder.attn.value"], "unit": UNIT}],
                "trainable": ["pet", "visual_embedding"],
                "lr": 0.01,
                "feature_dim": None,
                "grid": None,
            },
        },
        "data": {"init_args": {"root": str(root), "batch_size": 3}},
    }
    (root / "tiny.yaml").write_text(yaml.safe_dump(overlay))
    configs = (EXPERIMENTS / "image_text.yaml", EXPERIMENTS / "protocol" / "vlm.yaml", root / "tiny.yaml")
    return [word for path in configs for word in ("--config", str(path))]


@pytest.fixture(scope="module")
def checkpoint(words):
    assert run(["fit", *words]) == 0
    return Path(words[-1]).parent / "run" / "a" / "checkpoints" / "last.ckpt"


def test_a_run_learns_is_tested_exported_and_loaded(words, checkpoint, folder, tmp_path):
    assert run(["test", *words, "--ckpt_path", str(checkpoint)]) == 0
    records = [read_record(checkpoint.parents[1] / file_of(stage)) for stage in ("fit", "test")]
    assert [record["protocol"] for record in records] == ["vlm", "vlm"]
    rows = read_metrics(checkpoint.parents[1])
    names = {name for row in rows for name in row}
    assert {"test/vqa/accuracy", "test/gqa/accuracy", "test/nlvr2/accuracy", "test/caption/cider"} <= names
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert {name.split(".")[2] for name in state} == {"model"}
    assert sum("lora" in name for name in state) == 2 * 2 * 2
    assert any("connector" in name for name in state)
    assert not any("vision" in name or "embed" in name for name in state)
    assert run(["export", "--ckpt_path", str(checkpoint), "--out", str(tmp_path / "pet")]) == 0
    model = load_pet(tmp_path / "pet")
    assert all(torch.equal(tensor, state[f"model.{name}"]) for name, tensor in model.own_state().items())
    assert model.backbone.settings()["text"].startswith("<|im_start|>User:")


@pytest.mark.slow
def test_merged_units_score_the_same(words, folder, checkpoint, tmp_path):
    assert run(["test", *words, "--ckpt_path", str(checkpoint)]) == 0
    expected = read_metrics(checkpoint.parents[1])[-1]
    assert run(["export", "--ckpt_path", str(checkpoint), "--out", str(tmp_path / "whole"), "--merge"]) == 0
    written, ours = (load_image_processor(str(path)).to_dict() for path in (tmp_path / "whole", folder))
    assert written == ours
    plain = ["--model.placements", "[]", "--model.trainable", "[visual_embedding]"]
    moved = ["--model.backbone", str(tmp_path / "whole"), "--trainer.logger.init_args.version", "b"]
    assert run(["test", *words, *plain, *moved]) == 0
    found = read_metrics(checkpoint.parents[2] / "b")[-1]
    scores = {name for name in expected if name.startswith("test/")}
    assert len(scores) > 4
    assert {name: found[name] for name in scores} == pytest.approx({name: expected[name] for name in scores}, abs=1e-4)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["export", "--ckpt_path", "{checkpoint}", "--out", "{out}", "--format", "peft"],
            "peft's format would leave out the trained projector",
        ),
        (["importance", "{words}", "--out", "{out}"], "side networks, which models of kind 'smolvlm' do not take"),
    ],
)
def test_commands_that_do_not_apply_are_refused(words, checkpoint, tmp_path, command, message):
    out = tmp_path / "out"
    filled = [words if word == "{words}" else [word.format(checkpoint=checkpoint, out=out)] for word in command]
    with pytest.raises(ValueError, match=message):
        run([word for part in filled for word in part])
    assert not out.exists()


@pytest.mark.slow
def test_lora_of_peft_is_trained_tested_exported_and_loaded(words, tmp_path):
    pytest.importorskip("peft")
    peft = {"class_path": "peft.LoraConfig", "at": ["decoder.attn.query"], "init_args": {"r": 4}}
    overlay = {"model": {"init_args": {"placements": [], "peft": peft}}}
    (tmp_path / "peft.yaml").write_text(yaml.safe_dump(overlay))
    given = [*words, "--config", str(tmp_path / "peft.yaml"), "--trainer.logger.init_args.save_dir", str(tmp_path)]
    assert run(["fit", *given]) == 0
    last = tmp_path / "run" / "a" / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)["state_dict"]
    assert sum("lora" in name for name in state) == 2 * 2
    assert not any("vision" in name or "base_layer" in name for name in state)
    assert run(["test", *given, "--ckpt_path", str(last)]) == 0
    assert run(["export", "--ckpt_path", str(last), "--out", str(tmp_path / "pet")]) == 0
    model = load_pet(tmp_path / "pet")
    assert all(torch.equal(tensor, state[f"model.{name}"]) for name, tensor in model.own_state().items())


def test_peft_without_sites_is_refused(folder):
    pytest.importorskip("peft")
    peft = {"class_path": "peft.LoraConfig", "init_args": {"target_modules": ["q_proj"]}}
    with pytest.raises(ValueError, match="may match the vision tower too: place it at sites"):
        VLCausal(str(folder), peft=peft)


def test_sites_in_the_tower_are_refused(folder):
    said = "site 'vision.attn' cannot be used: the vision tower does not run in training"
    with pytest.raises(ValueError, match=said):
        VLCausal(str(folder), [Placement("vision.attn", LoRA)])
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=said):
        VLCausal(str(folder), peft={"class_path": "peft.LoraConfig", "at": ["vision.attn"]})


def test_another_template_is_another_method(words, checkpoint):
    other = "User: {images} {text} :"
    with pytest.raises(ValueError, match=r"this checkpoint is of another method: template: .*<\|im_start\|>User:"):
        run(["test", *words, "--model.template", other, "--ckpt_path", str(checkpoint)])


def test_answers_begin_after_the_prompt_and_end_at_the_end_token(folder):
    units = Placement(["decoder.attn.query", "decoder.attn.value", "decoder.ffn"], LoRA.with_(rank=8))
    module = VLCausal(str(folder), [units], ["pet", "visual_embedding"])
    module.configure_model()
    batch = make_batch(module, "vqa", ["what color ?"], torch.randn(1, 4, 8), ["red"])
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.convert_ids_to_tokens(batch.input_ids[0])[-1] == "<end_of_utterance>"
    assert tokenizer.convert_ids_to_tokens(batch.labels[0]) == ["red", "<end_of_utterance>"]
    model = module.model.eval()
    inputs = model.backbone.decoder_inputs(model.lm, batch.labels)
    assert tokenizer.convert_ids_to_tokens(inputs[0]) == [":", "red"]
    assert model.mask(batch).sum() == 2 + 1 + 2 + 1 + 1 + (len(batch.input_ids[0]) - 1) + 3
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        module.loss(batch).backward()
        optimizer.step()
    assert module.answer(batch) == ["red"]
    best, *_ = module.answer(batch, top=2)[0]
    assert best.text == "red"
    with torch.no_grad():
        chances = model(batch).softmax(dim=-1)[0, [0, 1], batch.labels[0]]
    assert best.probability == pytest.approx(chances.prod().item(), rel=1e-4)


def test_parameters_are_counted_without_weights(words, capsys):
    assert run(["params", *words, "--sites"]) == 0
    shown = capsys.readouterr().out
    assert "decoder.attn.query" in shown
    assert "visual embedding" in shown


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"template": "no placeholder"},
            r"template 'no placeholder' must have \{images\} and \{text\} once",
        ),
        ({"template": "{text} {images} :"}, r"must have \{images\} and \{text\} once, in this order"),
        ({"template": "{images} {images} {text} :"}, "once, in this order"),
        ({"template": "{images} {text}"}, "has nothing after .text.: an answer needs a token to start from"),
        ({"image_template": "<image>"}, r"must have \{tokens\}"),
        ({"image_template": "<picture>{tokens}"}, r"has no token '<picture>', which the prompt needs: set"),
    ],
)
def test_templates_that_lose_something_are_refused(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        VLCausal(str(folder), trainable=["visual_embedding"], **settings).configure_model()


CHAT = (
    "<|im_start|>{% for message in messages %}User says:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>{% endfor %}Assistant:"
)


def test_the_prompt_is_the_chat_template_of_the_tokenizer_where_it_has_one(folder):
    family, tokenizer = BACKBONES["smolvlm"], load_tokenizer(str(folder))
    assert chat_prompt(tokenizer, "<image>", "tiny") is None
    tokenizer.chat_template = CHAT
    text = "<|im_start|>User says:{images}{text}<end_of_utterance>Assistant:"
    assert chat_prompt(tokenizer, "<image>", "tiny") == text
    tokenizer.chat_template = CHAT.replace("<image>", "")
    with pytest.raises(ValueError, match="in which '<image>' and the text must be once: set template"):
        chat_prompt(tokenizer, "<image>", "tiny")
    assert family.with_settings(str(folder), None).settings()["text"] == family.text_template


def test_a_saved_chat_template_is_used(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "chatting")
    tokenizer = load_tokenizer(str(copied))
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(copied)
    backbone = BACKBONES["smolvlm"].with_settings(str(copied), None)
    assert backbone.settings()["text"].startswith("<|im_start|>User says:")
    assert backbone.template.before == tuple(tokenizer("<|im_start|>User says:", add_special_tokens=False)["input_ids"])


def test_a_sequence_longer_than_the_window_is_refused_before_training(words, folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "short")
    config = json.loads((copied / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 40
    (copied / "config.json").write_text(json.dumps(config))
    message = r"a sample of vqa may have \d+ tokens \(1 of images\), and .* reads at most 40: use smaller images"
    with pytest.raises(ValueError, match=message):
        run(["fit", *words, "--model.backbone", str(copied), "--trainer.logger.init_args.version", "short"])


@pytest.mark.parametrize(("name", "value"), [("mask_padding", True), ("projector", torch.nn.Linear)])
def test_settings_that_do_not_apply_are_refused(folder, name, value):
    with pytest.raises(ValueError, match=f"{name} is .*, which VLCausal does not support: "):
        VLCausal(str(folder), **{name: value})


@pytest.mark.parametrize("name", ["cuda_graphs", "generation_graphs"])
def test_graphs_are_refused_with_the_tower(folder, name):
    with pytest.raises(ValueError, match=f"{name} is true, but vision towers compute with values on the host"):
        VLCausal(str(folder), image_input="pixels", **{name: True})
    assert getattr(VLCausal(str(folder), **{name: True}), name)


def test_other_families_and_dropout_are_refused(folder, tiny_backbone):
    with pytest.raises(ValueError, match=r"VLCausal needs a decoder-only model \(.*smolvlm.*\), .* is 'bart'"):
        VLCausal(str(tiny_backbone))
    with pytest.raises(ValueError, match=r"dropout is 0\.1: decoder-only models have none"):
        VLCausal(str(folder), dropout=0.1)
