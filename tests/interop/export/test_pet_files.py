"""Export and import of trained weights, and refused files."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.interop.export.exported import loud, module_of
from tests.runs import make_batch, placements
from tests.tiny import save_backbone
from vlpet_lightning import load_pet, save_pet
from vlpet_lightning.checksums import checksum
from vlpet_lightning.interop.export.pet_files import load_weights
from vlpet_lightning.interop.export.record import CONFIG, WEIGHTS
from vlpet_lightning.pet import (
    VLPET,
    Adapter,
    Compacter,
    HyperFormer,
    LoRA,
    LowRankProjector,
    PerTask,
    Placement,
    Prompt,
    SmallGate,
)
from vlpet_lightning.pet.serialization import from_plain, to_plain

SITES = ["encoder.attn", "decoder.ffn"]
METHODS = {
    "vlpet": {},
    "identity": {"placements": [Placement(SITES, partial(Adapter, rank=4, scale=0.3))], "start": "identity"},
    "compacter": {"placements": [Placement(SITES, partial(Compacter, rank=4, shared_rule=True))]},
    "per task": {
        "placements": [
            Placement(SITES, partial(PerTask, unit=partial(Adapter, rank=4), tasks=["vqa", "gqa"], share=["down"]))
        ]
    },
    "prompt": {"placements": [Placement(["encoder.prompt", "decoder.prompt"], partial(Prompt, length=3, hidden=4))]},
    "hyperformer": {"placements": [Placement(SITES, partial(HyperFormer, tasks=["vqa"], rank=4))]},
    "biases and norms": {"placements": [], "trainable": ["visual_embedding", "bias", "encoder.layer_norm"]},
    "frozen visual embedding": {"trainable": ["pet"]},
    "projector": {"projector": partial(LowRankProjector, rank=4, gate_rank=4)},
}


@pytest.fixture
def make(tiny_backbone, tiny_t5):
    def made(kind="bart", backbone=None, **changes):
        default = {"bart": tiny_backbone, "t5": tiny_t5}[kind]
        if "placements" in changes and "trainable" not in changes:
            changes["trainable"] = ["pet", "visual_embedding"]
        return module_of(kind, backbone or default, **changes)

    return made


@pytest.fixture
def exported(make, tmp_path):
    """An export of VL-PET-large."""
    module = make()
    loud(module.model)
    save_pet(module, tmp_path / "pet", metrics={"test/average": 51.25})
    return tmp_path / "pet"


def state(model):
    return {name: p.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["bart", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_a_round_trip_under_another_seed_gives_equal_outputs(make, tmp_path, kind, method, monkeypatch):
    module = make(kind, **METHODS[method])
    model, batch = loud(module.model).eval(), make_batch("vqa", 3, 0)
    save_pet(module, tmp_path)
    expected = model(batch)
    torch.manual_seed(5)
    loaded = load_pet(tmp_path, backbone=module.backbone_name)
    assert torch.equal(loaded(batch), expected)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    again = make(kind, **METHODS[method], pet_weights=str(tmp_path))
    assert torch.equal(again.model.eval()(batch), expected)


def test_an_export_holds_what_the_backbone_lacks_and_says_what_it_belongs_to(exported, make):
    model = make().model
    held = load_file(exported / WEIGHTS)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(held) == trained | {"added_vocabulary"}  # rows initialised when the vocabulary is extended
    record = json.loads((exported / CONFIG).read_text())
    assert record["method"].startswith("VLPET(rank=8, heads=4")
    assert record["model"]["placements"][0]["at"] == ["encoder.attn", "encoder.ffn"]
    assert record["model"]["placements"][0]["unit"]["class_path"] == "vlpet_lightning.pet.VLPET"
    assert record["parameters"]["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert record["backbone"]["sizes"]["d_model"] == 32
    assert len(record["backbone"]["checksums"]) == 3
    card = (exported / "README.md").read_text()
    assert "| test/average | 51.25 |" in card
    assert 'model = load_pet("DIR", backbone=' in card


def test_the_card_of_an_export_calls_a_folder_by_its_name(exported, tiny_backbone):
    assert f"# Parameter-efficient tuning of {tiny_backbone.name}\n" in (exported / "README.md").read_text()


def test_loading_leaves_the_random_numbers_alone(exported):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_pet(exported)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"placements": placements(rank=4)},
            ["encoder.attn, encoder.ffn: VLPET with rank=8, gate", "there, with rank=4, gate"],
        ),
        ({"placements": placements(gate=SmallGate)}, ["LargeGate", "SmallGate"]),
        ({"trainable": ["pet"]}, ["trainable:", "encoder.layer_norm"]),
        ({"start": "identity"}, ['start: "original" there, "identity" here']),
        ({"grid": None}, ["grid: 2 there, null here"]),
        ({"mask_padding": True}, ["mask_padding: false there, true here"]),
    ],
)
def test_another_method_is_refused_before_a_weight_changes(exported, make, changes, words):
    if changes.get("start"):
        changes = changes | {"placements": placements()}
    model = make(**({"trainable": ["pet", "visual_embedding", "encoder.layer_norm"]} | changes)).model
    before = state(model)
    with pytest.raises(ValueError, match="weights are of another method") as error:
        load_weights(model, exported)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_another_backbone_of_the_same_shape_is_refused(exported, tmp_path):
    other = save_backbone(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"trained on the backbone .*, not on .*other.*: other values in lm\.model"):
        load_pet(exported, backbone=str(other))


def test_another_vocabulary_or_width_is_refused(exported, tmp_path, tiny_backbone, tiny_t5):
    from transformers import BartConfig, BartForConditionalGeneration

    shutil.copytree(tiny_backbone, tmp_path / "wide")
    config = BartConfig.from_pretrained(tiny_backbone, d_model=16, encoder_ffn_dim=24)
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="d_model 32 there, 16 here; encoder_ffn_dim 64 there, 24 here"):
        load_pet(exported, backbone=str(tmp_path / "wide"))
    config = BartConfig.from_pretrained(tiny_backbone, vocab_size=300)
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="vocabulary 246 there, 300 here"):
        load_pet(exported, backbone=str(tmp_path / "wide"))
    with pytest.raises(ValueError, match=r"need a bart backbone, .* is 't5'"):
        load_pet(exported, backbone=str(tiny_t5))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(exported, name):
    (exported / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name} in .*export` has written"):
        load_pet(exported)


def test_a_damaged_file_is_refused(exported):
    content = bytearray((exported / WEIGHTS).read_bytes())
    content[-5] ^= 1
    (exported / WEIGHTS).write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"pet_model\.safetensors is damaged or of another export"):
        load_pet(exported)
    (exported / CONFIG).write_text("{")
    with pytest.raises(ValueError, match=r"pet_config\.json cannot be read"):
        load_pet(exported)


@pytest.mark.parametrize(("section", "key"), [("model", "start"), ("backbone", "checksums")])
def test_a_record_that_does_not_say_all_is_refused(exported, section, key):
    record = json.loads((exported / CONFIG).read_text())
    del record[section][key]
    (exported / CONFIG).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"pet_config\.json lacks {section}\.{key}: export again"):
        load_pet(exported)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model", 3),
        ("model.feature_dim", "16"),
        ("model.feature_dim", True),
        ("model.grid", [2]),
        ("model.mask_padding", 1),
        ("model.placements", {}),
        ("model.placements.0", "encoder.attn"),
        ("model.placements.0.at", "encoder.attn"),
        ("model.trainable", "pet"),
        ("model.placements.0.at", [1]),
        ("model.placements.0.unit", {"class_path": 3}),
        ("model.placements.0.unit", {"class_path": "vlpet_lightning.pet.VLPET", "init_args": [1]}),
        ("model.trainable", [1]),
        ("model.feature_dim", -1),
        ("model.grid", 0),
        ("backbone.sizes", None),
        ("backbone.kind", None),
        ("weights.sha256", 0),
    ],
)
def test_a_config_with_a_value_of_another_type_names_it(exported, tmp_path, path, value):
    folder = shutil.copytree(exported, tmp_path / "copy")
    record = json.loads((folder / "pet_config.json").read_text())
    *above, last = path.split(".")
    part = record
    for name in above:
        part = part[int(name) if name.isdecimal() else name]
    part[int(last) if last.isdecimal() else last] = value
    (folder / "pet_config.json").write_text(json.dumps(record))
    named = re.escape(path.replace(".placements.0", ".placements[0]").removesuffix(".at").removesuffix(".unit"))
    with pytest.raises(ValueError, match=rf"pet_config\.json has {named} .*: export again"):
        load_pet(folder)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("rank", "x", "vlpet_lightning.pet.VLPET needs int for rank, got 'x'"),
        ("rank", -1, "rank must be at least 1, got -1"),
        ("rank", 5, "rank 5 is not divisible by heads 4"),
        ("scale", "x", "vlpet_lightning.pet.VLPET needs float for scale, got 'x'"),
        ("scale", True, "vlpet_lightning.pet.VLPET needs float for scale, got True"),
        ("split", "sideways", "vlpet_lightning.pet.VLPET needs Literal['down', 'up', 'both', 'pairs'] for split"),
        ("gate", 3, "vlpet_lightning.pet.VLPET needs collections.abc.Callable"),
        ("gate", {"class_path": "vlpet_lightning.pet.LargeGate", "init_args": {"rank": "x"}}, "LargeGate needs int"),
        ("gate", {"class_path": "vlpet_lightning.pet.LargeGate", "init_args": {"rank": -1}}, "rank must be at least 1"),
        ("width", 3, "got multiple values for argument 'width'"),
        ("rnk", 3, "VLPET has no setting 'rnk'"),
    ],
)
def test_a_wrong_setting_of_a_unit_is_named_with_file_and_placement(exported, setting, value, message):
    record = json.loads((exported / CONFIG).read_text())
    record["model"]["placements"][0]["unit"]["init_args"][setting] = value
    (exported / CONFIG).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"pet_config\.json: placements\[0\]\.unit: .*" + re.escape(message)) as error:
        load_pet(exported)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("setting", ["unit", "projector"])
def test_a_record_that_names_no_class_is_refused(exported, setting):
    record = json.loads((exported / CONFIG).read_text())
    (record["model"]["placements"][0] if setting == "unit" else record["model"])[setting] = {"rank": 3}
    (exported / CONFIG).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"pet_config\.json: .*{setting} must be a class_path with init_args"):
        load_pet(exported)


def test_a_folder_of_hugging_face_peft_says_how_to_read_it(exported, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"read it with peft\.PeftModel"):
        load_pet(tmp_path)


def test_weights_of_one_backbone_are_not_looked_for_on_the_other_kind(exported):
    with pytest.raises(ValueError, match="these weights need a bart backbone, 't5-base' is 't5'"):
        load_pet(exported, backbone="t5-base")


def test_tensors_of_another_shape_are_refused(exported, make):
    held = load_file(exported / WEIGHTS)
    held["visual.box.0.bias"] = torch.zeros(3)
    held["more"] = torch.zeros(1)
    save_file(held, exported / WEIGHTS)
    record = json.loads((exported / CONFIG).read_text())
    record["weights"]["sha256"] = checksum(exported / WEIGHTS)
    (exported / CONFIG).write_text(json.dumps(record))
    model = make().model
    before = state(model)
    with pytest.raises(
        ValueError, match=r"more is not of this model; .*box\.0\.bias has shape \(3,\) there, \(32,\) here"
    ):
        load_weights(model, exported)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


class Foreign(LoRA):
    """A class unknown to the library."""


HERE = f"{__name__}.Foreign"


def test_a_foreign_class_is_neither_imported_nor_run_unless_allowed(make, tmp_path):
    module = make(placements=[Placement(["encoder.attn.query"], partial(Foreign, rank=2))])
    save_pet(module, tmp_path)
    with pytest.raises(ValueError, match=f"'{HERE}' is neither a class of vlpet_lightning.pet nor allowed"):
        load_pet(tmp_path)
    loaded = load_pet(tmp_path, allow=[HERE])
    assert isinstance(loaded.injected[0].unit, Foreign)


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "subprocess.Popen",
        "vlpet_lightning.pet.unit.nn.Linear",
        "vlpet_lightning.pet.inject.nn",
        "torch.nn.ReLU",
    ],
)
def test_only_our_classes_are_made(path):
    with pytest.raises(ValueError, match=r"neither a class of|there is no class|no torch\.nn\.Module class"):
        from_plain({"class_path": path, "init_args": {}})


def test_plain_data_has_the_defaults_written_out():
    data = to_plain(partial(VLPET, rank=4, gate=SmallGate))
    assert data["init_args"]["heads"] == 4
    assert data["init_args"]["gate"]["class_path"] == "vlpet_lightning.pet.SmallGate"
    assert to_plain(from_plain(data)) == data


def test_a_unit_that_cannot_be_written_down_is_refused(make, tmp_path):
    module = make(placements=[Placement(["encoder.attn.query"], lambda width: LoRA(width))])
    with pytest.raises(ValueError, match=r"lambda.* cannot be written to a file: make units from a class"):
        save_pet(module, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rule", ["all", "language_model", "token_embedding"])
def test_a_trained_backbone_is_no_export(make, tmp_path, rule):
    module = make(placements=[], trainable=["visual_embedding", rule])
    with pytest.raises(ValueError, match=r"of the backbone's [\d,]+ parameters were trained .*not a PET export"):
        save_pet(module, tmp_path / "out")
    assert not (tmp_path / "out").exists()
