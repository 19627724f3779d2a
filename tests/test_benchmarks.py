"""Benchmarks run at the tiny size and compare what they say they compare."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.backbones.tiny_vlm import MODELS
from tests.benchmarks import generate, growth, memory, train, vlm_loading
from tests.benchmarks.contenders import FULL, KINDS, LST, METHODS, draw_pool, make_batches, our_model, plain_model
from tests.benchmarks.pairs import interleaved
from vlpet_lightning.backbones import BACKBONES

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_plain_loop_trains_the_same_parameters(kind, method):
    models = our_model(kind, method, tiny=True), plain_model(kind, method, tiny=True)
    batch = make_batches(kind, [3], text="vqa", target="caption")[0]
    for model in models:
        model.loss(batch).backward()
    for counted in (lambda p: p.requires_grad, lambda p: p.grad is not None):
        ours, plain = (sum(p.numel() for p in model.parameters() if counted(p)) for model in models)
        assert ours == plain > 0


def test_sorted_batches_hold_the_same_samples_with_less_padding():
    random, sorted_ = (make_batches("bart", [4] * 8, text="vqa", target="caption", sort=sort) for sort in (False, True))

    def texts(batches):
        return sorted(tuple(ids[ids != 1].tolist()) for batch in batches for ids in batch.input_ids)

    assert texts(random) == texts(sorted_)
    assert sum(batch.input_ids.numel() for batch in sorted_) < sum(batch.input_ids.numel() for batch in random)


@pytest.mark.parametrize("name", ["vqa", "caption"])
def test_a_round_represents_all_batches(name):
    scenario = train.SCENARIOS[name]
    means = []
    for pool in train.pools("bart", scenario, 16):
        lengths, chosen = [sum(pair) for pair in pool.padded()], pool.spread(scenario.batches)
        assert len(set(chosen)) == scenario.batches == 5
        means += [sum(lengths) / 50, sum(lengths[number] for number in chosen) / 5]
    assert means[0] > means[2] + 2  # less padding in buckets
    assert means == pytest.approx([means[0], means[0], means[2], means[2]], abs=0.3)


def test_chosen_batches_are_made_without_the_others():
    pool = draw_pool("bart", [4] * 6, text="vqa", target="caption", sort=True)
    (batch,) = pool.batches([3], images=2)
    text, target = pool.padded()[3]
    assert (batch.input_ids.shape, batch.labels.shape, batch.features.shape[:2]) == ((4, text), (4, target), (4, 2))
    assert torch.equal(batch.input_ids, pool.batches()[3].input_ids)


def test_growth_of_time_and_memory(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "AXES", {"rank": [8, 32], "layers": [1, 2]})
    words = ["--tiny", "--json", "--rounds", "1", "--axes", "rank", "layers", "--out", str(tmp_path / "growth.png")]
    growth.main(words)
    points = json.loads(capsys.readouterr().out)
    assert [point["value"] for point in points] == growth.AXES["rank"] + growth.AXES["layers"]
    assert (tmp_path / "growth.png").stat().st_size > 0
    for axis in ("rank", "layers"):
        for name in ("gflop", "activations", "state"):
            found = [point[name] for point in points if point["axis"] == axis]
            assert found == sorted(set(found))
    assert all(point["seconds"] > 0 for point in points)
    assert growth.rate_of(points) > 0


@pytest.mark.slow
def test_starts_with_more_samples_hold_more_memory(capsys):
    growth.main(["--json", "--rounds", "1", "--axes", "samples", "--samples", "10000", "100000"])
    few, many = json.loads(capsys.readouterr().out)
    assert (few["value"], many["value"]) == (10_000, 100_000)
    assert 0 < few["data"] < many["data"]


def test_contenders_take_turns():
    calls = []
    works = {name: (lambda name=name: calls.append(name)) for name in ("plain", "ours")}
    timings = interleaved(works, samples=1, rounds=2, warm_up=1)
    assert calls == ["plain", "ours"] * 3
    assert [timing.name for timing in timings] == ["plain", "ours"]
    assert timings[0].speedup == 1


def test_training_is_reported_as_json(capsys):
    train.main(
        [
            "--tiny",
            "--json",
            "--kinds",
            "bart",
            "--methods",
            "LoRA",
            "--scenarios",
            "vqa",
            "--batch",
            "2",
            "--rounds",
            "1",
        ]
    )
    (result,) = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["times"]][:2] == ["plain loop", "ours"]
    assert result["formula"] > 1
    assert all(row["samples"] == 10 and row["samples_per_second"] > 0 for row in result["times"])


def test_generation_reports_equal_tokens(capsys):
    generate.main(
        ["--tiny", "--json", "--kinds", "bart", "--beams", "3", "--batch", "2", "--rounds", "1", "--length", "6"]
    )
    (result,) = json.loads(capsys.readouterr().out)
    assert result["tokens_equal"] is True
    assert result["mean_length"] == 6


MEMORY = ["--tiny", "--json", "--kinds", "t5", "--targets", "9"]


@pytest.mark.slow
def test_peaks_of_larger_steps_are_higher(capsys):
    # each in a process of its own: this one may already hold more memory than a step needs
    memory.main([*MEMORY, "--batch", "1", "64", "--rounds", "0", "--methods", LST])
    small, large = json.loads(capsys.readouterr().out)
    assert large["peak"] - large["before"] > small["peak"] - small["before"]
    assert min(small["before"], large["before"]) > small["weights"]


def test_predicted_memory_is_that_of_the_method():
    shape = memory.Shape("bart", 4, 20, 36, 9)
    ladder, lora, full = (memory.predict(shape, method, "", tiny=True) for method in (LST, "LoRA", FULL))
    assert 1.5 * ladder["activations_gpu"] < min(lora["activations_gpu"], full["activations_gpu"])
    assert ladder["activations_gpu"] < ladder["activations_cpu"]
    assert full["gradients"] == sum(4 * p.numel() for p in our_model("bart", FULL, tiny=True).parameters())
    half = memory.predict(shape, "LoRA", "bf16, frozen weights in bf16", tiny=True)
    assert half["activations_gpu"] < lora["activations_gpu"]
    assert half["weights"] < lora["weights"]


def test_contenders_are_all_methods_and_the_plain_loop_of_those_that_it_can_train():
    options = memory.parser().parse_args(["--methods", LST, "LoRA", FULL, "--plain", "--bf16"])
    plain, half = "plain loop", "bf16, frozen weights in bf16"
    expected = [(LST, ""), ("LoRA", ""), (FULL, ""), ("LoRA", plain), (FULL, plain)]
    assert memory.contenders(options) == [*expected, (LST, half), ("LoRA", half), (FULL, half)]


def test_ratios_are_to_the_first_method_of_each_shape():
    shape = {"kind": "t5", "batch": 2, "text": 3, "images": 4, "target": 5, "way": ""}
    rows = [
        {**shape, "batch": batch, "method": method, "peak": peak * memory.GIB}
        for batch, method, peak in ((2, LST, 1), (2, "LoRA", 3), (8, LST, 2), (8, "LoRA", 3))
    ]
    found = memory.tables(rows)
    assert [str(table.title) for table in found] == [
        f"t5, batch {batch}, 3 text, 4 image and 5 target tokens" for batch in (2, 8)
    ]
    assert [list(table.columns[1].cells) for table in found] == [
        ["1.00 (1.00)", "3.00 (3.00)"],
        ["2.00 (1.00)", "3.00 (1.50)"],
    ]


@pytest.fixture
def tiny_vlm(monkeypatch):
    """Name of a tiny model, which is written and loaded like those known by name."""
    family = BACKBONES["idefics3"]
    config = MODELS["idefics3"].config.to_dict()
    monkeypatch.setitem(family.known, "tiny", {key: config[key] for key in ("text_config", "vision_config")})
    monkeypatch.setattr(vlm_loading, "KNOWN", ["tiny"])
    return "tiny"


def test_models_are_written_and_loaded_with_and_without_their_tower(tiny_vlm, tmp_path):
    written = vlm_loading.write_model(tiny_vlm, 1, str(tmp_path))
    assert written["layers"] == 1
    assert 0 < written["tower"] < written["parameters"]
    for tower in (True, False):
        found = vlm_loading.measure(str(tmp_path), tower)
        assert found["seconds"] > 0
        assert found["peak"] >= found["after"]


@pytest.mark.slow
def test_loading_is_reported_as_json(tiny_vlm, capsys):
    vlm_loading.main(["--model", tiny_vlm, "--rounds", "1", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["way"] for row in rows] == list(vlm_loading.WAYS)


@pytest.mark.slow
def test_memory_and_time_are_reported_by_method(capsys):
    memory.main([*MEMORY, "--batch", "32", "--rounds", "1", "--methods", LST, "LoRA"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in rows] == [LST, "LoRA"]
    assert all(row["peak"] > row["before"] > row["weights"] > row["gradients"] for row in rows)
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.slow
def test_the_gpu_script_runs_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    parts = ["machine", "correctness", "training", "parity", "memory T5", "bank", "decoder-only models", "fit"]
    done = subprocess.run([*command, "--parts", *parts], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert not [row for row in rows if "failed" in row], done.stderr
    assert {row["part"] for row in rows} >= {f"{part}: time" for part in parts}
    assert (tmp_path / "gpu.md").read_text().count("\n| ") == 1 + len(rows)  # and the header
