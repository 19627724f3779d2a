"""The ``budget`` command at the real sizes, compared with the published counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from vlpet_lightning.__main__ import run as main
from vlpet_lightning.commands.budget import budget
from vlpet_lightning.commands.params import report_of

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
IMAGE_TEXT = ["--config", str(EXPERIMENTS / "image_text.yaml")]
T5 = str(EXPERIMENTS / "backbone" / "t5_base.yaml")


def run(capsys, *words):
    budget([*words, "--json"])
    return json.loads(capsys.readouterr().out)


def values(candidate):
    return [rank["value"] for rank in candidate["ranks"]]


# SPEC section 1 and 6: percentages of the papers, with the ranks and counts that have them
@pytest.mark.parametrize(
    ("method", "percent", "ranks", "trained", "total"),
    [
        ("vlpet_large", "4.16", [96, 96, 96], 6_052_416, 145_606_464),
        ("lora", "5.93", [128], 8_786_688, 148_234_752),
        pytest.param("compacter", "2.70", [96], 3_870_240, 143_395_104, marks=pytest.mark.slow),
        ("hyperformer", "5.79", [96], 8_579_088, 148_103_952),
        ("prompt_tuning", "2.00", [40, 800], 2_843_936, 142_417_952),
    ],
)
def test_a_published_percentage_gives_the_published_rank(capsys, method, percent, ranks, trained, total):
    first = run(capsys, "--percent", percent, "--method", method)["candidates"][0]
    assert (values(first), first["trainable"], first["total"]) == (ranks, trained, total)
    assert first["exact"]
    assert first["searched"] == "in proportion"


@pytest.mark.slow
def test_a_published_percentage_on_t5_gives_the_published_ranks(capsys):
    first = run(capsys, "--percent", "7.31", "--method", "vlpet_large_t5", "--backbone", "t5_base")["candidates"][0]
    assert (values(first), first["trainable"], first["total"]) == ([192, 192, 96], 17_582_208, 240_521_856)


def test_a_number_of_parameters_is_met_exactly(capsys):
    found = run(capsys, "--parameters", "8,786,688", "--method", "lora")
    assert (values(found["candidates"][0]), found["candidates"][0]["exact"]) == ([128], True)
    assert found["candidates"][0]["distance"] == 0
    near = run(capsys, "--parameters", "8786689", "--method", "lora")["candidates"]
    assert not any(one["exact"] for one in near)
    assert near[0]["distance"] == -1


@pytest.mark.slow
def test_no_other_rank_is_nearer(capsys):
    first = run(capsys, "--percent", "3.3", "--method", "vl_adapter")["candidates"][0]
    (rank,) = values(first)
    names = "[encoder.attn,encoder.ffn,decoder.attn,decoder.cross,decoder.ffn]"
    for other in (rank - 1, rank, rank + 1):
        unit = f"{{class_path: vlpet_lightning.pet.Adapter, init_args: {{rank: {other}}}}}"
        words = [*IMAGE_TEXT, "--config", str(EXPERIMENTS / "pet" / "vl_adapter.yaml")]
        report = report_of([*words, f"--model.init_args.placements=[{{at: {names}, unit: {unit}}}]"])
        assert abs(report.percent - 3.3) >= abs(first["distance"])
        assert (report.trainable == first["trainable"]) is (other == rank)


@pytest.mark.slow
def test_the_first_candidate_keeps_the_sites_and_the_others_follow_by_distance(capsys):
    found = run(capsys, "--percent", "3.0", "--method", "vlpet_large")["candidates"]
    sites = ["encoder.attn", "encoder.ffn", "decoder.cross.value"]
    assert [one["sites"] for one in found[:2]] == [sites, sites]
    assert [one["searched"] for one in found[:2]] == ["in proportion, LargeGate rank adjusted", "in proportion"]
    assert [one["exact"] for one in found[:2]] == [True, False]
    assert len(set(values(found[1]))) == 1
    distances = [abs(one["distance"]) for one in found[2:]]
    assert distances == sorted(distances)
    kinds = {tuple(one["sites"]) for one in found}
    assert {("encoder.attn", "encoder.ffn"), ("encoder.attn",), ("encoder.ffn",), ("decoder.cross.value",)} < kinds
    for one in found:
        assert all(rank["value"] % 4 == 0 for rank in one["ranks"] if rank["unit"] == "VLPET")


@pytest.mark.parametrize(
    ("method", "backbone", "choose"),
    [
        pytest.param("vlpet_large", "bart_base", 1, marks=pytest.mark.slow),
        ("vlpet_large", "bart_base", 3),
        pytest.param("hyperformer", "bart_base", 2, marks=pytest.mark.slow),
        pytest.param("lora_t5", "t5_base", 1, marks=pytest.mark.slow),
    ],
)
def test_the_written_yaml_trains_what_is_printed(capsys, tmp_path, method, backbone, choose):
    out = tmp_path / "found.yaml"
    found = run(
        capsys,
        "--percent",
        "3.5",
        "--method",
        method,
        "--backbone",
        backbone,
        "--choose",
        str(choose),
        "--out",
        str(out),
    )
    said = found["candidates"][choose - 1]
    words = [*IMAGE_TEXT, "--config", str(EXPERIMENTS / "backbone" / f"{backbone}.yaml"), "--config", str(out)]
    report = report_of(words)
    assert (report.trainable, report.total) == (said["trainable"], said["total"])
    assert out.read_text() == found["yaml"]
    head = [line for line in out.read_text().splitlines() if line.startswith("#")]
    assert f"{said['trainable']:,} of {said['total']:,}" in head[1]
    assert f"--config {out}" in head[-1]
    assert "budget --percent 3.5" in out.read_text()


def test_other_settings_of_the_method_stay(capsys):
    content = yaml.safe_load(run(capsys, "--percent", "8", "--method", "lora_multiple")["yaml"])
    assert content["data"]["init_args"]["prompts"] == {"vqa": "", "gqa": "", "nlvr2": "", "caption": ""}
    assert content["model"]["init_args"]["trainable"] == ["pet", "visual_embedding", "bias"]
    unit = content["model"]["init_args"]["placements"][0]["unit"]
    assert unit["class_path"] == "vlpet_lightning.pet.PerTask"
    assert unit["init_args"]["unit"]["init_args"]["alpha"] == 32


def test_overrides_of_fit_count(capsys):
    video = ["--model.feature_dim=512", "--model.grid=null"]
    first = run(capsys, "--percent", "3.37", "--method", "vlpet_large", *video)["candidates"][0]
    assert (values(first), first["trainable"]) == ([96, 96, 96], 4_872_768)


def test_several_methods_share_a_table(capsys):
    found = run(capsys, "--percent", "3", "--method", "lora", "vl_adapter")["candidates"]
    assert {one["method"] for one in found[:4]} == {"lora", "vl_adapter"}


def test_a_granularity_becomes_placements(capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    unit = {
        "class_path": "vlpet_lightning.pet.Granularity",
        "init_args": {"gate": "small", "rank": 48, "value_rank": 24},
    }
    path.write_text(yaml.safe_dump({"model": {"init_args": {"placements": unit}}}))
    found = run(capsys, "--percent", "2", "--method", str(path))
    vlpet, value = values(found["candidates"][1])
    assert vlpet == 2 * value
    assert [entry["at"] for entry in yaml.safe_load(found["yaml"])["model"]["init_args"]["placements"]] == [
        ["encoder.attn", "encoder.ffn"],
        ["decoder.cross.value"],
    ]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("bitfit", r"bitfit has no rank to choose: it trains 1,708,800 of 141,156,864 parameters, 1.21 %"),
        ("full", r"full has no rank to choose: it trains 141,156,864 of 141,156,864 parameters, 100.00 %"),
        ("layer_norm", "layer_norm has no rank to choose: it trains 1,632,000 of"),
        ("ia3", "ia3 has no rank to choose: it trains 1,647,360 of"),
        (
            "lst",
            r"lst has no rank to choose: it trains 10,028,172 of 149,602,188 parameters, 6.70 %; choose a method with",
        ),
        ("vlpet_lage", "no config 'vlpet_lage': did you mean 'vlpet_large'"),
    ],
)
def test_a_method_without_a_rank_is_refused(method, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        budget(["--percent", "3", "--method", method])


def test_methods_of_peft_are_refused_with_their_own_cure():
    pytest.importorskip("peft", reason="methods of Hugging Face peft need the extra")
    with pytest.raises(ValueError, match=r"hf_dora has no rank to choose: .*model.peft.init_args.r"):
        budget(["--percent", "3", "--method", "hf_dora"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--percent", "0.5"],
            r"lora cannot train 0.5 % of facebook/bart-base: it reaches 1,727,232 \(1.22 %\) to 44,176,128 \(24.06 %\)"
            r"; 1,708,800 \(1.21 %\) are trained without any unit. Choose a budget in between$",
        ),
        (["--percent", "40"], "or raise --max-rank$"),
        (["--percent", "10", "--max-rank", "64"], r"to 5,247,744 \(3.63 %\); .*, or raise --max-rank$"),
        (["--parameters", "100"], "cannot train 100 parameters"),
        (["--percent", "3", "--max-rank", "0"], "--max-rank must be 1 or more, got 0"),
        (["--percent", "3", "--choose", "99"], "--choose is 99, and there are 7 candidates"),
        (["--percent", "three"], "--percent must be a number such as 3.0, got 'three'"),
        (["--parameters", "4.5e6"], "--parameters must be a whole number such as 4000000, got '4.5e6'"),
        (["--percent", "3", "--model.trainable=[visual_embedding]"], "no rank of lora changes what is trained"),
    ],
)
def test_an_impossible_budget_is_one_error(words, message):
    with pytest.raises(ValueError, match=message):
        budget([*words, "--method", "lora"])


def test_units_that_accept_no_rank_are_named():
    with pytest.raises(ValueError, match="units of compacter accept no rank up to --max-rank 1: raise it"):
        budget(["--percent", "3", "--method", "compacter", "--max-rank", "1"])


def test_a_file_is_replaced_only_on_request(tmp_path, capsys):
    out = tmp_path / "found.yaml"
    out.write_text("mine")
    words = ["--percent", "3", "--method", "vl_adapter", "--out", str(out)]
    with pytest.raises(FileExistsError, match="give another name, or --overwrite"):
        budget(words)
    assert out.read_text() == "mine"
    budget([*words, "--overwrite"])
    assert yaml.safe_load(out.read_text())["model"]["init_args"]["placements"]
    assert f"{out}: row 1" in capsys.readouterr().out.replace("\n", "")
    assert list(tmp_path.iterdir()) == [out]


def test_out_must_be_a_file_in_a_folder(tmp_path):
    with pytest.raises(FileExistsError, match="give a file"):
        budget(["--percent", "3", "--method", "lora", "--out", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        budget(["--percent", "3", "--method", "lora", "--out", str(tmp_path / "nowhere" / "x.yaml")])


def test_the_command_prints_the_table_and_the_yaml(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    words = ["--percent", "4.16", "--method", "vlpet_large", "--backbone", "bart_base"]
    assert main(["budget", *words]) == 0
    printed = capsys.readouterr().out
    assert "1*" in printed
    assert "6,052,416" in printed
    content = yaml.safe_load(printed[printed.index("# vlpet_large") :])
    assert content["model"]["init_args"]["placements"][1]["unit"]["init_args"]["rank"] == 96
