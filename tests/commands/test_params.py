"""The ``params`` command, compared with the published table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlpet_lightning.__main__ import run
from vlpet_lightning.commands.params import model_of, params, report_of
from vlpet_lightning.parameters import placement_report

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
IMAGE_TEXT = ["--config", str(EXPERIMENTS / "image_text.yaml")]

# VL-PET repository, README and print_trainable_params_percentage, BART-base on the image-text tasks
PUBLISHED = {
    "vlpet_large": (145_606_464, 6_052_416, 4.16),
    "vlpet_middle_x": (143_835_852, 4_281_804, 2.98),
    "vlpet_middle_y": (143_835_840, 4_281_792, 2.98),
    "vlpet_small": (143_845_068, 4_291_020, 2.98),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_equal_the_published_ones(name):
    report = report_of([*IMAGE_TEXT, "--config", str(EXPERIMENTS / "pet" / f"{name}.yaml")])
    total, trainable, percent = PUBLISHED[name]
    assert (report.total, report.trainable) == (total, trainable)
    assert round(report.percent, 2) == percent
    assert sum(count.total for count in report.groups.values()) == total
    assert sum(count.trainable for count in report.groups.values()) == trainable


def test_groups_of_the_large_variant_equal_the_published_columns():
    groups = report_of(IMAGE_TEXT).groups
    assert {name: group.trainable for name, group in groups.items() if group.trainable} == {
        "visual embedding": 1_582_848,
        "encoder PET": 1_779_840,
        "encoder gates": 1_779_840,
        "decoder PET": 889_920,
        "encoder norms": 19_968,
    }
    assert groups["decoder norms"].total == 29_184
    assert groups["biases"].total == 101_376


def test_share_of_the_bare_backbone_leaves_the_added_vocabulary_out():
    assert report_of(IMAGE_TEXT).percent_of_backbone == pytest.approx(100 * 6_052_416 / 139_420_416)


def test_json_has_the_promised_keys(capsys):
    params([*IMAGE_TEXT, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert {"total", "trainable", "percent", "percent_of_backbone", "groups"} == set(printed)
    assert printed["groups"]["encoder gates"] == {"total": 1_779_840, "trainable": 1_779_840}


def test_sites_says_where_every_unit_is_and_what_the_rules_matched(capsys):
    params([*IMAGE_TEXT, "--sites", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert [(row["site"], row["layers"], row["parameters"]) for row in printed["sites"]] == [
        ("encoder.attn", [0, 1, 2, 3, 4, 5], 1_779_840),
        ("encoder.ffn", [0, 1, 2, 3, 4, 5], 1_779_840),
        ("decoder.cross.value", [0, 1, 2, 3, 4, 5], 889_920),
    ]
    assert "gate LargeGate(scale=1.0, down 768->96, up 96->768)" in printed["sites"][0]["unit"]
    assert "decoder.ffn" in printed["free_sites"]
    assert "encoder.ffn" not in printed["free_sites"]
    assert printed["rules"] == [
        {"rule": "pet", "tensors": 120, "parameters": 4_449_600},
        {"rule": "visual_embedding", "tensors": 9, "parameters": 1_582_848},
        {"rule": "encoder.layer_norm", "tensors": 26, "parameters": 19_968},
    ]
    assert printed["trainable"] == 6_052_416


def test_sites_of_a_side_network_are_one_row(capsys):
    words = [
        "--config",
        str(EXPERIMENTS / "backbone" / "t5_base.yaml"),
        "--config",
        str(EXPERIMENTS / "pet/lst_t5.yaml"),
    ]
    params([*IMAGE_TEXT, *words, "--sites", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert (printed["total"], printed["trainable"], round(printed["percent"], 2)) == (240_926_232, 17_967_384, 7.46)
    assert printed["groups"]["side network gates"] == {"total": 24, "trainable": 24}
    assert [(row["site"], row["unit"], row["parameters"]) for row in printed["sites"]] == [
        ("side", "LadderSideNetwork(768->192, temperature=0.1)", 17_967_384 - 1_581_312)
    ]
    assert [rule["parameters"] for rule in printed["rules"]] == [17_967_384 - 1_581_312, 1_581_312]


def test_sites_names_what_units_share_once():
    report = placement_report(model_of([*IMAGE_TEXT, "--config", str(EXPERIMENTS / "pet" / "hyperformer.yaml")]))
    shared = {row.unit.partition(":")[0]: row.parameters for row in report.sites if not row.site}
    assert shared == {"task_embedding": 2_048, "hypernet_encoder": 2_805_080, "hypernet_decoder": 4_139_960}
    assert {row.parameters for row in report.sites if row.site} == {0}


def test_sites_names_what_another_library_inserted():
    pytest.importorskip("peft", reason="methods of Hugging Face peft need the extra")
    report = placement_report(model_of([*IMAGE_TEXT, "--config", str(EXPERIMENTS / "pet" / "hf_dora.yaml")]))
    row = next(
        row for row in report.sites if row.site.endswith("encoder.layers.*.self_attn.q_proj.lora_A.default.weight")
    )
    assert (row.unit, row.layers, row.parameters) == ("128x768", (0, 1, 2, 3, 4, 5), 6 * 128 * 768)
    assert sum(row.parameters for row in report.sites) == report.rules[0].parameters


def test_sites_prints_tables(capsys):
    params([*IMAGE_TEXT, "--sites"])
    printed = capsys.readouterr().out
    assert "decoder.cross.value" in printed
    assert "0-5" in printed
    assert "free sites" in printed
    assert "encoder.layer_norm" in printed
    assert "6,052,416 of 145,606,464" in printed


def test_the_command_prints_a_table(capsys):
    assert run(["params", *IMAGE_TEXT]) == 0
    assert "6,052,416 of 145,606,464 parameters are trained: 4.16 %" in capsys.readouterr().out


def test_an_unknown_site_names_the_valid_ones():
    placements = "--model.init_args.placements=[{at: [encoder.attention], unit: vlpet_lightning.pet.ParallelAdapter}]"
    done = subprocess.run(
        [sys.executable, "-m", "vlpet_lightning", "params", *IMAGE_TEXT, placements], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "unknown site 'encoder.attention'" in done.stderr
    assert "encoder.attn" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_backbone_of_the_other_kind_is_named_without_a_look_at_the_hub():
    words = ["--model.class_path=vlpet_lightning.VLT5", "--model.backbone=facebook/bart-base"]
    with pytest.raises(ValueError, match="VLT5 needs a t5 backbone, 'facebook/bart-base' is 'bart': use VLBart"):
        report_of([*IMAGE_TEXT, *words])
