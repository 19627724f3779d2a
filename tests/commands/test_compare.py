"""The ``compare`` command, compared with the published counts and with the library's own formulas."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from vlpet_lightning.__main__ import run as main
from vlpet_lightning.commands.compare import compare, differing, paths_of, read_side
from vlpet_lightning.commands.params import model_of
from vlpet_lightning.display import as_bytes
from vlpet_lightning.flops import sizes_of, training_flops

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
STEP = ["--task", "gqa", "--batch-size", "4", "--text", "20", "--target", "5"]


def run(capsys, *words):
    compare([*words, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def two():
    """VL-PET-large and LoRA on BART-base, as the command prints them."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        compare(["image_text", "image_text+lora", *STEP, "--json"])
    return json.loads(printed.getvalue())


def test_counts_are_the_published_ones(two):
    first, second = (config["parameters"] for config in two["configs"])
    assert (first["total"], first["trainable"]) == (145_606_464, 6_052_416)
    assert (second["total"], second["trainable"]) == (148_234_752, 8_786_688)
    assert second["groups"]["decoder PET"] == {"total": 4_718_592, "trainable": 4_718_592}
    assert [config["config"] for config in two["configs"]] == ["image_text", "image_text+lora"]


def test_flops_are_those_of_the_formula(two):
    for config, overlays in zip(two["configs"], ([], ["pet/lora.yaml"]), strict=True):
        words = [w for path in ("image_text.yaml", *overlays) for w in ("--config", str(EXPERIMENTS / path))]
        expected = training_flops(sizes_of(model_of(words)), images=36, source=56, target=5)
        assert config["flops"] == expected


def test_sizes_are_those_of_the_parameters(two):
    for config in two["configs"]:
        trained = config["parameters"]["trainable"]
        assert config["gradients"] == 4 * trained
        assert config["optimizer"] == 8 * trained
        added_rows = 4 * 200 * 768
        assert config["checkpoint"] == config["export"] + config["optimizer"]
        assert config["weights"] - 4 * config["parameters"]["total"] < 10**6  # buffers
        parts = ("weights", "gradients", "optimizer", "activations")
        assert config["memory"] == sum(config[part] for part in parts)
        assert config["export"] >= 4 * trained + added_rows
    assert two["configs"][0]["export"] == 4 * (6_052_416 + 200 * 768)


def test_differing_settings_are_listed_by_site(two):
    settings = two["settings"]
    assert settings["model.trainable"] == [
        '["pet", "visual_embedding", "encoder.layer_norm"]',
        '["pet", "visual_embedding", "bias"]',
    ]
    first, second = settings["model.placements.encoder.attn"]
    assert first.startswith("VLPET(rank=96, heads=4,")
    assert "gate=LargeGate(rank=96" in first
    assert second == "-"
    value = settings["model.placements.decoder.cross.value"]
    assert value == ["ParallelAdapter(rank=96, scale=1.0, init=normal)", "LoRA(rank=128, alpha=32.0, dropout=0.1)"]
    assert not any(name.startswith(("data.", "trainer.", "config")) for name in settings)


def test_positions_of_units_are_compared():
    sides = [
        read_side(f"image_text+vlm/smolvlm_256m+vlm/pet/{name}", []) for name in ("vlpet_large", "vlpet_large_all")
    ]
    first, second = differing(sides)["model.placements.decoder.attn"]
    assert first == f"{second} at prefix positions"


def test_a_config_equals_itself(capsys):
    compare(["image_text", str(EXPERIMENTS / "image_text.yaml"), *STEP])
    printed = capsys.readouterr().out
    assert "The configs have the same settings." in printed
    assert "image_text (1)" in printed
    assert "image_text (2)" in printed
    assert "6,052,416" in printed
    assert "1.000" in printed


def test_columns_are_named_by_what_differs(capsys):
    compare(["image_text+bart_base+lora", "image_text+bart_base+bitfit", *STEP])
    head = next(line for line in capsys.readouterr().out.splitlines() if "difference" in line)
    assert "lora" in head
    assert "bitfit" in head
    assert "bart_base" not in head


def test_half_the_rank_is_named_and_costs_less(capsys, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text((EXPERIMENTS / "pet" / "vl_adapter.yaml").read_text().replace("rank: 96", "rank: 48"))
    found = run(capsys, "image_text,vl_adapter", f"image_text,{mine}", *STEP)
    big, small = found["configs"]
    for name in ("flops", "activations", "checkpoint", "gradients"):
        assert small[name] < big[name]
    assert len(found["settings"]) == 5  # one row per site
    for there, here in found["settings"].values():
        assert there.replace("rank=96", "rank=48") == here


@pytest.mark.slow
def test_the_batch_multiplies_activations_alone(capsys, two):
    few, many = run(capsys, "image_text", "image_text", *STEP, "--batch-size", "2")["configs"][0], two["configs"][0]
    assert many["activations"] == pytest.approx(2 * few["activations"], rel=0.01)
    assert (many["flops"], many["weights"]) == (few["flops"], few["weights"])


def test_the_step_defaults_to_the_tasks_batch_and_limits(capsys):
    steps = [c["step"] for c in run(capsys, "image_text", "image_text+t5_base+vlpet_large_t5")["configs"]]
    assert [(s["task"], s["samples"], s["text"], s["target"], s["precision"]) for s in steps] == [
        ("vqa", 500, 20, 10, "32-true"),
        ("vqa", 300, 20, 10, "32-true"),
    ]


def test_overrides_apply_to_both_configs(capsys):
    found = run(capsys, "image_text", "image_text+full", *STEP, "--precision", "bf16-mixed", "--model.feature_dim=512")
    assert [c["parameters"]["groups"]["visual embedding"]["total"] for c in found["configs"]] == [
        1_582_848 - 1536 * 768
    ] * 2
    assert {c["step"]["precision"] for c in found["configs"]} == {"bf16-mixed"}
    frozen, full = found["configs"]
    assert full["optimizer"] > 20 * frozen["optimizer"]


def test_kernels_of_a_cpu_save_other_tensors(capsys, two):
    on_cpu = run(capsys, "image_text", "image_text", *STEP, "--device", "cpu")["configs"][0]
    assert on_cpu["activations"] != two["configs"][0]["activations"]


@pytest.mark.parametrize(
    "name",
    [
        "prompt_tuning_decoder",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("hyperformer", "dora", "compacter_large")),
    ],
)
def test_methods_with_shared_modules_prompts_or_generated_weights_have_a_cost(capsys, name):
    found = run(capsys, "image_text", f"image_text+{name}", *STEP)["configs"][1]
    assert found["activations"] > 5 * 10**7
    assert found["optimizer"] == 8 * found["parameters"]["trainable"]


@pytest.mark.parametrize(
    ("ladder", "other"),
    [
        ("lst", "vlpet_large"),
        pytest.param("t5_base+lst_t5", "t5_base+vlpet_large_t5", marks=pytest.mark.slow),
        pytest.param("lst", "lora", marks=pytest.mark.slow),
    ],
)
def test_a_side_network_needs_fewer_operations_and_less_memory(capsys, ladder, other):
    ours, theirs = run(capsys, f"image_text+{ladder}", f"image_text+{other}", *STEP)["configs"]
    for name, factor in (("flops", 2.5), ("activations", 2.4)):
        assert theirs[name] > factor * ours[name]
    assert ours["parameters"]["groups"]["side network PET"]["trainable"] > 8 * 10**6
    assert ours["memory"] == ours["weights"] + ours["activations"] + 3 * ours["gradients"]


@pytest.mark.parametrize("name", ["hf_dora", pytest.param("hf_vera", marks=pytest.mark.slow)])
def test_methods_of_peft_have_a_cost(capsys, name):
    pytest.importorskip("peft", reason="methods of Hugging Face peft need the extra")
    found = run(capsys, "image_text", f"image_text+{name}", *STEP)
    assert found["configs"][1]["activations"] > 5 * 10**7
    assert any("peft" in setting for setting in found["settings"])


def test_the_tables_are_written_as_markdown_and_not_replaced_unasked(capsys, tmp_path):
    out = tmp_path / "report.md"
    compare(["image_text", "image_text+lora", *STEP, "--out", str(out)])
    text = out.read_text()
    assert "| | image_text | image_text+lora | difference | ratio |" in text
    assert "| trained parameters | 6,052,416 | 8,786,688 | +2,734,272 | 1.452 |" in text
    assert "Not counted: workspaces" in text
    assert "| model.placements.encoder.attn.query | - | LoRA(" in text
    with pytest.raises(FileExistsError, match="--overwrite"):
        compare(["image_text", "image_text+lora", *STEP, "--out", str(out)])
    assert out.read_text() == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["image_text", "image_text+loora"], "no config 'loora': did you mean 'lora'"),
        (["image_text", "image_text", "--batch-size", "0"], "samples must be"),
        (["image_text", "image_text", "--trainer.precision=64-true"], "precision '64-true' is not supported"),
        (["image_text", "image_text+hyperformer", "--task", "tvqa"], "has parts for vqa, gqa, nlvr2, caption alone"),
    ],
)
def test_errors_are_one_sentence(words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        compare(words)


def test_one_config_is_too_few(capsys):
    with pytest.raises(SystemExit):
        compare(["image_text"])
    assert "CONFIG" in capsys.readouterr().err


def test_configs_are_joined_by_plus_or_comma_and_a_file_may_have_either_in_its_name(tmp_path):
    assert [path.name for path in paths_of("image_text+t5_base,lora_t5")] == [
        "image_text.yaml",
        "t5_base.yaml",
        "lora_t5.yaml",
    ]
    odd = tmp_path / "a+b,c.yaml"
    odd.write_text("")
    assert paths_of(str(odd)) == [odd]


def test_the_command_prints_tables(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["compare", "image_text", "image_text+vl_adapter", *STEP]) == 0
    printed = capsys.readouterr().out
    assert "kernels of a GPU" in printed
    assert "activation memory" in printed
    assert "settings that differ" in printed


def test_bytes_have_binary_units():
    assert [as_bytes(n) for n in (0, 1023, 1024, 2**20, 1.5 * 2**30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.0 MiB",
        "1.50 GiB",
    ]
