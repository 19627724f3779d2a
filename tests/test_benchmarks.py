"""Benchmarks run at the tiny size and compare what they say they compare."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks import generate, train
from tests.benchmarks.contenders import KINDS, METHODS, make_batches, our_model, plain_model
from tests.benchmarks.pairs import interleaved

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
    assert all(row["samples"] == 8 and row["samples_per_second"] > 0 for row in result["times"])


def test_generation_reports_equal_tokens(capsys):
    generate.main(
        ["--tiny", "--json", "--kinds", "bart", "--beams", "3", "--batch", "2", "--rounds", "1", "--length", "6"]
    )
    (result,) = json.loads(capsys.readouterr().out)
    assert result["tokens_equal"] is True
    assert result["mean_length"] == 6


@pytest.mark.slow
def test_the_gpu_script_runs_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    parts = ["machine", "correctness", "training", "parity", "bank", "fit"]
    done = subprocess.run([*command, "--parts", *parts], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert not [row for row in rows if "failed" in row], done.stderr
    assert {row["part"] for row in rows} >= {f"{part}: time" for part in parts}
    assert (tmp_path / "gpu.md").read_text().count("\n| ") == 1 + len(rows)  # and the header
