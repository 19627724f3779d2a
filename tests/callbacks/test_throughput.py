"""Measurements of the throughput callback, with a fake clock that advances with each reading."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from callbacks import Throughput
from callbacks.throughput import PARTS, Clock
from tests.runs import Batches, make_batch, quiet_trainer, tiny_module
from vlpet_lightning.batch import IGNORED
from vlpet_lightning.flops import sizes_of, training_flops
from vlpet_lightning.loggers import read_metrics

SAMPLES, IMAGES = 3, 4  # in a batch from tests.runs.make_batch, whose last sample has 5 of 7 words and 3 of 4 targets


@pytest.fixture
def ticking(monkeypatch):
    """A clock that advances by one second with each reading."""
    ticks = count()
    monkeypatch.setattr(Clock, "now", lambda self: next(ticks))
    monkeypatch.setattr(Clock, "seconds", lambda self, earlier, later: later - earlier)


def rows(backbone, tmp_path, batches, every=2, **changes):
    """Return the logged windows and the model."""
    logger, module = CSVLogger(tmp_path, name="run", version="a"), tiny_module(backbone)
    quiet_trainer(tmp_path, logger=logger, callbacks=[Throughput(every)], **changes).fit(module, Batches(batches))
    name = "throughput/step_ms"
    found = [row for row in read_metrics(tmp_path / "run" / "a") if name in row]
    return [{name.removeprefix("throughput/"): value for name, value in row.items()} for row in found], module.model


def batches(number):
    return [make_batch("gqa", SAMPLES, seed) for seed in range(number)]


def test_every_window_but_the_first_is_logged_at_its_last_step(tiny_backbone, tmp_path):
    found, _ = rows(tiny_backbone, tmp_path, batches(7))
    assert [row["step"] for row in found] == [4, 6]


def test_rates_are_counts_without_padding_over_time(tiny_backbone, tmp_path, ticking):
    (row,), model = rows(tiny_backbone, tmp_path, batches(4))
    assert [row[f"{part}_ms"] for part in PARTS] == [1000] * 4
    assert row["step_ms"] == 4000
    assert row["samples_per_s"] == row["samples_per_s_rank"] == SAMPLES / 4
    assert row["encoder_tokens_per_s"] == (7 + 7 + 5 + SAMPLES * IMAGES) / 4
    assert row["target_tokens_per_s"] == (4 + 4 + 3) / 4
    flops = SAMPLES * training_flops(sizes_of(model), images=IMAGES, source=7 + IMAGES, target=4)
    assert row["tflops_per_device"] == pytest.approx(flops / 4 / 1e12)


def test_a_filler_is_no_sample(tiny_backbone, tmp_path, ticking):
    filled = [replace(b, labels=torch.cat([b.labels[:2], torch.full((1, 4), IGNORED)])) for b in batches(4)]
    (row,), _ = rows(tiny_backbone, tmp_path, filled)
    assert row["samples_per_s"] == 2 / 4


def test_a_cpu_has_no_published_peak_and_no_peak_memory(tiny_backbone, tmp_path):
    (row,), _ = rows(tiny_backbone, tmp_path, batches(4))
    assert not {"utilisation_percent", "peak_memory_gb"} & set(row)


def test_accumulated_batches_are_steps_of_their_own(tiny_backbone, tmp_path, ticking):
    (row,), _ = rows(tiny_backbone, tmp_path, batches(4), accumulate_grad_batches=2)
    assert (row["step"], row["step_ms"], row["samples_per_s"]) == (2, 4000, SAMPLES / 4)


def test_rates_are_of_all_ranks_and_their_spread_is_logged(tiny_backbone, tmp_path):
    (row,), _ = rows(tiny_backbone, tmp_path, batches(4), devices=2, strategy="ddp_fork")
    assert 0 < row["samples_per_s_rank"] < row["samples_per_s"]
    assert 0 < row["rank_ms_min"] < row["rank_ms_max"]


def test_a_window_has_a_step_at_least():
    with pytest.raises(ValueError, match="every_n_steps must be 1 or more, got 0"):
        Throughput(0)


def test_the_device_is_waited_for_once_a_window(tiny_backbone, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(Clock, "wait", lambda self, moment: waits.append(moment))
    rows(tiny_backbone, tmp_path, batches(8), every=4)
    assert len(waits) == 1
