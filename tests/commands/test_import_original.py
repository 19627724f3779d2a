"""The ``import-original`` command, with command lines and checkpoints of the original."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from tests.interop.original import originals
from tests.interop.original.originals import TASKS, Sizes
from tests.runs import FEATURE_DIM, make_batch
from tests.tiny import WIDTH
from vlpet_lightning import load_pet
from vlpet_lightning.__main__ import for_the_user, run
from vlpet_lightning.cli import module_from_config
from vlpet_lightning.commands.import_original import config_from_flags, yaml_of
from vlpet_lightning.interop import original_tensors

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
IMAGE_TEXT = ["--config", str(EXPERIMENTS / "image_text.yaml")]
SINGLE = ["--use_single_adapter", "--use_tasks_prompts", "--tasks", ",".join(TASKS)]
VLPET_LARGE = f"""--backbone facebook/bart-base --lr 1e-3 --epochs 20 --batch_size 500 --valid_batch_size 500 --seed 42
    --warmup_ratio 0.1 --clip_grad_norm 5 --n_boxes 36 --downsample --use_adapter --no_encoder_adapter
    --no_decoder_adapter --use_encoder_adapter_down_multihead --encoder_adapter_multihead_num_head 4
    --use_encoder_adapter_gating_large_x_lowrank --unfreeze_encoder_layer_norms
    --use_decoder_enc_attn_value_parallel_adapter_down_dim {" ".join(SINGLE)}"""


def error_of(*words):
    with pytest.raises(Exception) as caught:  # any type of error
        run(["import-original", *words])
    meant = for_the_user(caught.value)
    assert meant is not None, f"not raised for the user: {caught.value!r}"
    return str(meant)


# command lines --------------------------------------------------------------------------------------------------------


def test_the_scripts_command_line_is_our_experiment(capsys, tmp_path):
    run(["import-original", "--flags", VLPET_LARGE])
    (tmp_path / "ours.yaml").write_text(capsys.readouterr().out)
    ours = module_from_config([*IMAGE_TEXT, "--config", str(tmp_path / "ours.yaml")])
    shipped = module_from_config([*IMAGE_TEXT, "--config", str(EXPERIMENTS / "pet" / "vlpet_large.yaml")])
    with torch.device("meta"):
        built = [module.build(pretrained=False) for module in (ours, shipped)]
    assert built[0].recipe == built[1].recipe
    for name in ("lr", "weight_decay", "warmup_ratio", "dropout", "backbone_name"):
        assert getattr(ours, name) == getattr(shipped, name)
    mine, theirs = (
        yaml.safe_load(path.read_text()) for path in (tmp_path / "ours.yaml", EXPERIMENTS / "image_text.yaml")
    )
    assert mine["data"]["init_args"]["batch_size"] == theirs["data"]["init_args"]["batch_size"]
    assert mine["trainer"]["max_epochs"] == theirs["trainer"]["max_epochs"]
    assert mine["trainer"]["gradient_clip_val"] == theirs["trainer"]["gradient_clip_val"]


def test_what_the_original_ignores_is_said_in_a_comment():
    text = yaml_of(["--backbone", "t5-base", "--use_lora", "--use_single_lora"])
    assert "# ignored by the original: --use_lora: T5 has no LoRA there" in text
    assert yaml.safe_load(text)["model"]["class_path"] == "vlpet_lightning.VLT5"


def test_a_command_line_of_videos_is_an_overlay_of_the_video_experiment():
    text = yaml_of(["--backbone", "facebook/bart-base", "--tasks", "tvqa,how2qa,tvc,yc2c"])
    assert "an overlay of experiments/video_text.yaml" in text
    assert yaml.safe_load(text)["model"]["init_args"]["feature_dim"] == 512


def test_a_command_line_without_task_prompts_has_empty_ones():
    config, _ = config_from_flags(["--backbone", "t5-base", "--tasks", "vqa,nlvr"])
    assert config["data"]["init_args"]["prompts"] == {"vqa": "", "nlvr2": ""}
    assert config["trainer"]["gradient_clip_val"] is None  # the original's default of -1 disables clipping


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--flags", "--backbone gpt2"], "'gpt2' names neither bart nor t5"),
        (["--flags", "--backbone facebook/mbart-large-50"], "is 'mbart': the original's backbones are BART and T5"),
        (["--flags", "--use_everything"], "unknown flags of the original: --use_everything"),
        (["--flags", "--use_lm_head_adapter"], r"broken in the original"),
        (["--flags", "--tasks vqa,vcr"], "unknown task 'vcr' in --tasks: choose from vqa, gqa, nlvr2"),
        (["--flags", "--tasks vqa,tvqa"], "images and videos are experiments of their own"),
        (["--flags", "--tasks 'vqa"], "cannot be split into words (No closing quotation): close the quote"),
        (["--checkpoint", "nowhere.pth", "--flags", "", "--out", "x"], "no checkpoint at 'nowhere.pth'"),
    ],
)
def test_what_cannot_be_read_is_one_error(words, message):
    assert message in error_of(*words)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--checkpoint", "LAST.pth"],
        ["--checkpoint", "LAST.pth", "--out", "x"],
        ["--flags", "", "--out", "x"],
        ["--flags", "", "--flgs"],
    ],
)
def test_words_that_do_not_say_enough_show_the_usage(words, capsys):
    with pytest.raises(SystemExit):
        run(["import-original", *words])
    assert "usage: python -m vlpet_lightning import-original" in capsys.readouterr().err


# checkpoints ----------------------------------------------------------------------------------------------------------

METHODS = {
    "vl-pet": (
        [
            {
                "at": ["encoder.attn", "encoder.ffn"],
                "unit": {
                    "class_path": "vlpet_lightning.pet.VLPET",
                    "init_args": {
                        "rank": 8,
                        "heads": 4,
                        "gate": {"class_path": "vlpet_lightning.pet.LargeGate", "init_args": {"rank": 8}},
                    },
                },
            },
            {
                "at": ["decoder.cross.value"],
                "unit": {"class_path": "vlpet_lightning.pet.ParallelAdapter", "init_args": {"rank": 8}},
            },
        ],
        lambda sizes: originals.vlpet(sizes, "large", 8, value_rank=8),
    ),
    "vl-adapter": (
        [
            {
                "at": ["encoder.attn", "encoder.ffn", "decoder.attn", "decoder.cross", "decoder.ffn"],
                "unit": {"class_path": "vlpet_lightning.pet.Adapter", "init_args": {"rank": 8}},
            }
        ],
        lambda sizes: originals.vl_adapter(sizes, 8),
    ),
    "vl-adapter-per-task": (
        [
            {
                "at": ["encoder.attn", "encoder.ffn", "decoder.attn", "decoder.cross", "decoder.ffn"],
                "unit": {
                    "class_path": "vlpet_lightning.pet.PerTask",
                    "init_args": {
                        "unit": {"class_path": "vlpet_lightning.pet.Adapter", "init_args": {"rank": 8}},
                        "tasks": ["vqa", "gqa", "nlvr2", "caption"],
                    },
                },
            }
        ],
        lambda sizes: originals.vl_adapter(sizes, 8),
    ),
}


def sizes_of(kind, model):
    vocabulary = len(model.backbone.token_embedding(model.lm))
    return Sizes(kind, WIDTH, 2 * WIDTH, 2, vocabulary, positions=66, features=FEATURE_DIM, heads=4)


@pytest.fixture(params=["bart", "t5"])
def kind(request):
    return request.param


@pytest.fixture
def prepared(kind, request, tmp_path):
    """Config of a method on a tiny backbone, its model, and an original checkpoint of that model."""
    backbone = request.getfixturevalue({"bart": "tiny_backbone", "t5": "tiny_t5"}[kind])

    def prepare(method):
        placements, added = METHODS[method]
        arguments = {"backbone": str(backbone), "placements": placements, "feature_dim": FEATURE_DIM, "grid": 2}
        arguments["trainable"] = ["pet", "visual_embedding"]
        overlay = {"model": {"class_path": f"vlpet_lightning.VL{kind.upper() if kind == 't5' else 'Bart'}"}}
        overlay["model"]["init_args"] = arguments
        config = tmp_path / "method.yaml"
        config.write_text(json.dumps(overlay))
        torch.manual_seed(3)
        model = module_from_config([*IMAGE_TEXT, "--config", str(config)]).build().eval()
        for parameter in model.unit_parameters().values():
            torch.nn.init.normal_(parameter, std=0.3)
        sizes = sizes_of(kind, model)
        names = originals.backbone(sizes) | added(sizes)
        state = dict(original_tensors(list(names), model.state_dict()))
        shared = model.backbone.token_embedding(model.lm).detach()
        state |= {name: shared for name in names if name not in state}
        assert set(state) == set(names)
        return config, model, {f"module.{name}": tensor.clone() for name, tensor in state.items()}

    return prepare


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_of_the_original_becomes_weights_of_ours(prepared, method, tmp_path, capsys):
    config, model, state = prepared(method)
    torch.save(state, tmp_path / "LAST.pth")
    words = ["--checkpoint", str(tmp_path / "LAST.pth"), "--config", str(EXPERIMENTS / "image_text.yaml")]
    run(["import-original", *words, "--config", str(config), "--out", str(tmp_path / "pet")])
    printed = capsys.readouterr().out
    assert "tensors matched" in printed
    assert "language model" in printed
    assert {path.name for path in (tmp_path / "pet").iterdir()} == {
        "pet_model.safetensors",
        "pet_config.json",
        "README.md",
    }
    torch.manual_seed(99)  # newly initialised vocabulary rows must not matter
    loaded = load_pet(tmp_path / "pet")
    batch = make_batch("vqa", 3, 0)
    if model.backbone.kind == "t5":
        batch = replace(batch, input_ids=batch.input_ids.clamp(min=1))
    assert torch.equal(loaded(batch), model(batch))


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_list_and_writes_nothing(prepared, tmp_path):
    config, _, state = prepared("vl-adapter")
    state["module.extra.weight"] = torch.zeros(2)
    gone = next(name for name in state if "ff_adapter.adapters.vqa.up_sampler.weight" in name)
    for task in TASKS:
        del state[gone.replace(".vqa.", f".{task}.")]
    torch.save(state, tmp_path / "LAST.pth")
    words = ["--checkpoint", str(tmp_path / "LAST.pth"), "--config", str(EXPERIMENTS / "image_text.yaml")]
    message = error_of(*words, "--config", str(config), "--out", str(tmp_path / "pet"))
    assert "unit.up.weight" in message
    assert "not of this model: ['lm.extra.weight']" in message
    assert not (tmp_path / "pet").exists()


class Code:
    """Executes code when it is unpickled."""

    def __reduce__(self):
        return (print, ("was run",))


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path, capsys):
    torch.save({"weight": torch.zeros(2), "code": Code()}, tmp_path / "LAST.pth")
    message = error_of("--checkpoint", str(tmp_path / "LAST.pth"), "--flags", VLPET_LARGE, "--out", str(tmp_path / "x"))
    assert "cannot be read as a checkpoint without executing code" in message
    assert "was run" not in capsys.readouterr().out


def test_a_file_without_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "LAST.pth")
    message = error_of("--checkpoint", str(tmp_path / "LAST.pth"), "--flags", VLPET_LARGE, "--out", str(tmp_path / "x"))
    assert "holds no state dict" in message
