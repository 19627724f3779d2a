"""Ladder Side-Tuning of the original: command lines, checkpoints, and initial weights."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import T5Config

from tests.interop.original.test_scripts import ROOT, SCRIPTS
from tests.parity import FOLDER, Parity, largest, tiny_t5
from vlpet_lightning import load_pet
from vlpet_lightning.__main__ import run
from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.commands.import_original import config_from_flags, yaml_of
from vlpet_lightning.commands.params import report_of
from vlpet_lightning.interop import model_from_original, original_tensors
from vlpet_lightning.interop.original.flags import parse_flags
from vlpet_lightning.interop.original.methods import method_from_flags
from vlpet_lightning.model import VLModel
from vlpet_lightning.pet import LadderSideNetwork, Placement
from vlpet_lightning.pet.pruning import write_importance

LST = SCRIPTS["ylsung/Ladder-Side-Tuning/VL-T5/scripts/image/LST.sh"]
SIDE = ["--backbone", "t5-base", "--use_side_transformers", "--side_reduction_factor", "4"]


def side_of(*words):
    """Return the settings of the side network of a command line."""
    method = method_from_flags(parse_flags([*SIDE, *words]), "t5", 768)
    (entry,) = method.placements
    assert entry["at"] == ["side"]
    assert entry["unit"]["class_path"] == "vlpet_lightning.pet.LadderSideNetwork"
    assert method.trainable == ["pet", "visual_embedding"]
    return entry["unit"]["init_args"]


# command lines --------------------------------------------------------------------------------------------------------


def test_the_script_is_converted_with_the_command_that_measures_the_importance(tmp_path):
    text = yaml_of([*shlex.split(LST), "--samples_for_fisher", "77"])
    assert "--load_side_pretrained_weights fisher-v2: before training, measure the importance:" in text
    command = "importance --config experiments/image_text.yaml --config THIS_FILE --samples 77 --out"
    assert f"#   python -m vlpet_lightning {command} importance.pt\n" in text
    config = yaml.safe_load(text)
    model = config["model"]["init_args"]
    assert (model["lr"], model["weight_decay"], model["warmup_ratio"], model["dropout"]) == (3e-3, 3e-2, 0.1, 0.1)
    assert config["trainer"] == {"max_epochs": 20, "gradient_clip_val": 5.0}
    assert config["data"]["init_args"]["batch_size"] == 300
    (tmp_path / "lst.yaml").write_text(text)
    files = [ROOT / "experiments" / "image_text.yaml", tmp_path / "lst.yaml"]
    report = report_of([word for file in files for word in ("--config", str(file))])
    assert (report.trainable, report.total) == (17_967_384, 240_926_232)  # counted by the original's code too


def test_the_flags_of_side_networks_have_the_original_defaults():
    args = parse_flags(["--use_side_transformers"])
    assert (args.side_reduction_factor, args.samples_for_fisher, args.load_side_pretrained_weights) == (8, 1024, "")
    assert side_of() == {"reduction": 4, "init": "uniform", "start": "fresh"}


@pytest.mark.parametrize(
    ("weights", "start", "measured"),
    [("", "fresh", False), ("t5-v2", "pruned", False), ("fisher-v2", "pruned", True), ("none", "fresh", False)],
)
def test_the_initial_weights_are_those_of_the_flag(weights, start, measured):
    words = ["--load_side_pretrained_weights", weights]
    found = side_of(*words)
    assert found["start"] == start
    assert found.get("importance", "unset") == (None if start == "pruned" else "unset")
    text = yaml_of([*SIDE, *words])
    assert ("vlpet_lightning importance" in text) == measured
    assert ("neither t5 nor fisher" in text) == (weights == "none")


def test_lists_of_layers_are_read_without_evaluating_them():
    found = side_of("--encoder_side_layers", "[1,3, 5]", "--decoder_side_layers", "(0,)")
    assert (found["encoder_layers"], found["decoder_layers"]) == ([1, 3, 5], [0])
    assert "encoder_layers" not in side_of("--encoder_side_layers", "None")


@pytest.mark.parametrize("text", ["list(range(6))", "[]", "[1.0]", "[True]", "3", "[1", "", "__import__('os')"])
def test_lists_that_are_no_integers_are_refused(text):
    with pytest.raises(ValueError, match=r"--encoder_side_layers: expected a list of layers like \[1,3,5\], got"):
        parse_flags(["--encoder_side_layers", text])


@pytest.mark.parametrize("text", ["[3,1]", "[1,1]"])
def test_lists_that_do_not_ascend_are_refused(text):
    with pytest.raises(ValueError, match="--decoder_side_layers: expected layers in ascending order"):
        parse_flags(["--decoder_side_layers", text])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--use_adapter --use_single_adapter --unfreeze_layer_norms", "beside --use_adapter, --unfreeze_layer_norms: "),
        ("--use_lora --use_single_lora", "beside --use_lora: "),
        ("--encoder_prompt_len 4 --use_single_prompt", "beside --encoder_prompt_len: "),
        ("--unfreeze_language_model --unfreeze_lm_head", "beside --unfreeze_language_model, --unfreeze_lm_head: "),
        ("--backbone facebook/bart-base", "with BART, whose code there has no side network"),
        ("--side_reduction_factor 1", "--side_reduction_factor 1, with which there are no projections"),
        ("--side_reduction_factor 7", "--side_reduction_factor 7, which does not divide the width of 768"),
        ("--side_reduction_factor 0", "--side_reduction_factor 0, which does not divide the width of 768"),
        ("--load_side_pretrained_weights fisher-v3", "fisher-v3: pruning v3 is not implemented here"),
        ("--load_side_pretrained_weights t5-v4", "t5-v4: pruning v4 crashes there"),
        ("--load_side_pretrained_weights fisher-v5", "fisher-v5: pruning v5 is not implemented here"),
        ("--load_side_pretrained_weights fisher", "fisher: pruning fisher does not exist there; v2 is supported"),
        ("--use_bitfit", "in a way not supported here: use_bitfit"),
    ],
)
def test_side_networks_that_are_not_supported_are_refused_with_the_reason(words, message):
    with pytest.raises(ValueError, match="not supported here") as caught:
        config_from_flags([*SIDE, *words.split()])
    assert message in str(caught.value)


def test_flags_without_a_side_network_are_noted():
    words = ["--backbone", "t5-base", "--load_side_pretrained_weights", "fisher-v3", "--encoder_side_layers", "[1]"]
    config, method = config_from_flags(words)
    assert config["model"]["init_args"]["placements"] == []
    assert method.notes == [
        "--encoder_side_layers: read with --use_side_transformers alone",
        "--load_side_pretrained_weights: read with --use_side_transformers alone",
    ]


# checkpoints; tests/test_parity.py compares losses, gradients and generated tokens ------------------------------------


@pytest.fixture(params=["t5-lst", "t5-lst-layers"])
def parity(request):
    return Parity(FOLDER / f"{request.param}.safetensors")


def config_of(parity):
    return tiny_t5(**json.loads(parity.metadata["config"]))


def test_both_encoders_agree_with_the_original(parity):
    states = parity.model.encode(parity.batch())
    assert largest(states.text, parity.tensors["output.encoder_text"]) < 5e-6
    assert largest(states.side, parity.tensors["output.encoder_side"]) < 5e-6


def test_weights_survive_the_way_there_and_back(parity):
    weights = parity.group("weight")
    back = dict(original_tensors(list(weights), parity.model.state_dict()))
    assert set(weights) - set(back) == set(json.loads(parity.metadata["unused"]))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in back.items())
    saved = {f"module.{name}": tensor for name, tensor in weights.items()}
    model = model_from_original(saved, parity.flags, config_of(parity))
    assert torch.equal(model(parity.batch()), parity.model(parity.batch()))


def test_side_layers_are_matched_by_the_layer_that_they_are_beside():
    """The second file has side layers beside encoder layers 1 and 2, and decoder layers 0 and 2."""
    parity = Parity(FOLDER / "t5-lst-layers.safetensors")
    weights, side = parity.group("weight"), parity.model.side
    assert torch.equal(side.encoder.rungs[0].gate, weights["encoder.side_gate_params.1"])
    assert torch.equal(side.decoder.rungs[1].down.bias, weights["decoder.side_downsamples.2.bias"])
    name = "layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(side.encoder.stack.block[0].get_parameter(name), weights[f"encoder.side_block.1.{name}"])


def test_other_side_layers_than_those_of_the_flags_are_refused():
    parity = Parity(FOLDER / "t5-lst-layers.safetensors")
    flags = [*parity.flags, "--encoder_side_layers", "[0,1]"]
    with pytest.raises(ValueError, match=r"beside the encoder's layers \[1, 2\], the model .* beside \[0, 1\]"):
        model_from_original(parity.group("weight"), flags, config_of(parity))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("decoder.side_downsamples.0.weight", r"missing: \['side.decoder.rungs.0.down.weight'\]"),
        ("side_final_upsample.bias", r"missing: \['side.up.bias'\]"),
        ("encoder.final_side_layer_norm.weight", r"missing: \['side.encoder.stack.final_layer_norm.weight'\]"),
    ],
)
def test_a_missing_tensor_of_the_side_network_is_named(parity, name, message):
    weights = parity.group("weight")
    del weights[name]
    with pytest.raises(ValueError, match=message):
        model_from_original(weights, parity.flags, config_of(parity))


def test_a_side_network_that_the_flags_do_not_mean_is_refused(parity):
    flags = [word for word in parity.flags if word != "--use_side_transformers"]
    with pytest.raises(ValueError, match=r"not of this model: .*side\.encoder\.rungs\.0\.down\.weight"):
        model_from_original(parity.group("weight"), flags, config_of(parity))


def test_a_checkpoint_becomes_weights_of_ours_with_the_logits_of_the_original(tmp_path):
    parity = Parity(FOLDER / "t5-lst-layers.safetensors")
    weights = parity.group("weight")
    config = config_of(parity)
    config.vocab_size = 100 - BACKBONES["t5"].added_vocabulary
    lm = BACKBONES["t5"].model_class(config)
    shared = weights["shared.weight"][: config.vocab_size]
    lm.load_state_dict(weights | {"shared.weight": shared, "lm_head.weight": shared}, strict=False)
    lm.save_pretrained(tmp_path / "t5")
    settings = method_from_flags(parse_flags(parity.flags), "t5", config.d_model)
    settings = {"placements": settings.placements, "trainable": settings.trainable}
    settings |= {"backbone": str(tmp_path / "t5"), "feature_dim": 16, "grid": 2}
    overlay = {"model": {"class_path": "vlpet_lightning.VLT5", "init_args": settings}}
    (tmp_path / "lst.yaml").write_text(json.dumps(overlay))
    torch.save({f"module.{name}": tensor for name, tensor in weights.items()}, tmp_path / "LAST.pth")
    words = ["--checkpoint", str(tmp_path / "LAST.pth"), "--config", str(ROOT / "experiments" / "image_text.yaml")]
    run(["import-original", *words, "--config", str(tmp_path / "lst.yaml"), "--out", str(tmp_path / "pet")])
    assert largest(load_pet(tmp_path / "pet")(parity.batch()), parity.tensors["output.logits"]) < 2e-5


# initial weights ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruning():
    """Return weights, importance and pruned weights of the original, and the model's config."""
    with safe_open(FOLDER / "lst-pruning.safetensors", framework="pt") as file:
        groups: dict[str, dict[str, torch.Tensor]] = {}
        for key in file.keys():  # noqa: SIM118  # not a dict
            group, _, name = key.partition(".")
            groups.setdefault(group, {})[name] = file.get_tensor(key)
        return groups, T5Config(**json.loads(file.metadata()["config"]))


def started(groups, config, importance):
    """Return a model whose side layers start from the weights of a file."""
    lm = BACKBONES["t5"].model_class(config)
    lm.load_state_dict(groups["weight"], strict=False)
    lm.tie_weights()
    unit = LadderSideNetwork.with_(reduction=4, init="uniform", importance=importance)
    model = VLModel(BACKBONES["t5"], lm, feature_dim=16, grid=2, placements=[Placement("side", unit)])
    model.start_from_backbone()
    return model


def test_side_layers_pruned_by_magnitude_start_with_the_weights_of_the_original(pruning):
    groups, config = pruning
    expected = groups["t5"]
    ours = dict(original_tensors(list(expected), started(groups, config, None).state_dict()))
    assert ours.keys() == expected.keys()
    assert [name for name, weight in expected.items() if not torch.equal(ours[name], weight)] == []


def test_side_layers_pruned_by_importance_start_with_the_weights_of_the_original(pruning, tmp_path):
    groups, config = pruning
    channels = groups["importance"]["shared.weight"].sum(dim=0)
    found = {name: tensor for name, tensor in groups["importance"].items() if name != "shared.weight"}
    lm = BACKBONES["t5"].model_class(config)
    lm.load_state_dict(groups["weight"], strict=False)
    weights = dict(lm.named_parameters())
    write_importance(tmp_path / "importance.pt", weights, channels, found, samples=3)
    model = started(groups, config, str(tmp_path / "importance.pt"))
    expected = groups["fisher"]
    ours = dict(original_tensors(list(expected), model.state_dict()))
    assert [name for name, weight in expected.items() if not torch.equal(ours[name], weight)] == []
    assert any(not torch.equal(weight, groups["t5"][name]) for name, weight in expected.items())


def test_fresh_side_layers_are_drawn_with_the_width_of_the_backbone():
    """The original's initialisation reads the backbone's config: a query of 0.0156, not of 0.0625 as for its width."""
    torch.manual_seed(0)
    lm = BACKBONES["t5"].model_class(T5Config(vocab_size=80, d_model=128, d_kv=32, d_ff=512, num_layers=1, num_heads=4))
    narrow = BACKBONES["t5"].narrow_stack(lm, "decoder", 4, 1)
    deviations = {
        "layer.0.SelfAttention.q": (128 * 32) ** -0.5,
        "layer.1.EncDecAttention.k": 128**-0.5,
        "layer.1.EncDecAttention.o": (4 * 32) ** -0.5,
        "layer.2.DenseReluDense.wi": 128**-0.5,
        "layer.2.DenseReluDense.wo": 512**-0.5,
    }
    for name, deviation in deviations.items():
        assert narrow.block[0].get_submodule(name).weight.std().item() == pytest.approx(deviation, rel=0.1), name
