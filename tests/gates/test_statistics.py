"""Streaming statistics equal those of all factors together, for every gate and kind of token."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from tests.gates.models import GATES, KINDS, batch_of, with_gate
from tests.runs import make_batch
from vlpet_lightning.batch import IGNORED
from vlpet_lightning.gates import encode_with_gates
from vlpet_lightning.gates.collecting import ALL, Collector, with_own_answers
from vlpet_lightning.gates.recording import Source
from vlpet_lightning.gates.statistics import BINS, QUANTILES, Moments, PositionMeans, Running, Variation, limits
from vlpet_lightning.pet import Gated, LargeGate, MiddleYGate, Placement, Prompt, SmallGate

TASKS = ("vqa", "nlvr2")


class Words:
    """Stand-in for a tokenizer of two words."""

    def __call__(self, word: str, **_: Any) -> Any:
        return type("Encoded", (), {"input_ids": [{"false": 9, "true": 10}[word]]})()


def collected(model: Any, kind: str, **changes: Any) -> tuple[Collector, list[Any]]:
    """Run two batches of each task and return the statistics, and the recorded gates of each batch."""
    collector, records = Collector(model, Words(), **changes), []
    for task in TASKS:
        for seed in (0, 1):
            batch = batch_of(kind, task, seed)
            collector.add(batch)
            records.append((batch, model(batch, return_gates=True)[1]))
    return collector, records


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", GATES)
def test_streamed_statistics_are_those_of_all_factors_together(models: Any, gate: str, kind: str) -> None:
    collector, records = collected(with_gate(models, kind, gate), kind)
    cells = collector.cells()
    seen = set()
    for task in TASKS:
        for site in ("encoder.attn", "encoder.ffn"):
            for layer in (0, 1):
                together: dict[str, list[torch.Tensor]] = {}
                for _, record in (r for r in records if r[1].task == task):
                    factors = record.factors[site, layer]
                    if factors.dim() < 3:
                        together[ALL] = [factors]
                    elif factors.shape[1] == 1:
                        together.setdefault(ALL, []).append(factors.flatten())
                    else:
                        for name, mask in record.kinds.items():
                            values = factors[mask].flatten()
                            together.setdefault(name, []).append(values)
                            if name != "padding":
                                together.setdefault(ALL, []).append(values)
                for name, parts in together.items():
                    values = torch.cat(parts).double().numpy()
                    if not len(values):
                        assert (task, site, layer, name) not in cells
                        continue
                    seen.add((task, site, layer, name))
                    check(cells[task, site, layer, name], values)
    assert seen == set(cells)
    assert collector.samples == {"vqa": 6, "nlvr2": 6}


def check(moments: Moments, values: np.ndarray) -> None:
    found = moments.as_dict()
    assert found["count"] == len(values)
    assert found["mean"] == pytest.approx(values.mean(), rel=1e-12)
    assert found["std"] == pytest.approx(values.std(), rel=1e-9, abs=1e-12)
    assert (found["min"], found["max"]) == (values.min(), values.max())
    assert found["near_0"] == (abs(values.astype(np.float32)) < 0.1).mean()
    assert found["near_1"] == (abs(values.astype(np.float32) - np.float32(1)) < 0.1).mean()
    below, above = (values < 0).sum(), (values > 2).sum()
    inside, _ = np.histogram(values, BINS, (0, 2))
    assert moments.histogram.tolist() == [below, *inside, above]
    if moments.range is None:
        assert found["saturated"] is None
    else:
        low, high = moments.range
        edge = 0.05 * (high - low)
        assert low <= values.min() <= values.max() <= high
        assert found["saturated"] == ((values < low + edge) | (values > high - edge)).mean()
    for share in QUANTILES:  # linear between the order statistics on either side
        wide = 1 / 128 if not below + above else max(1 / 128, 2 - values.min(), values.max() - 2)
        low, high = np.quantile(values, share, method="lower"), np.quantile(values, share, method="higher")
        assert low - wide <= found[f"q{round(100 * share):02d}"] <= high + wide


def test_quantiles_of_many_factors_are_right_to_a_bin() -> None:
    values = torch.rand(20_000, generator=torch.Generator().manual_seed(0)).pow(3) * 1.7
    moments = Moments()
    for part in values.split(999):
        moments.add(part)
    for share in QUANTILES:
        assert moments.quantile(share) == pytest.approx(float(np.quantile(values, share)), abs=1 / 128)


def test_a_factor_on_the_edge_of_a_bin_is_counted_once() -> None:
    moments = Moments((0, 2))
    moments.add(torch.tensor([-0.5, 0.0, 1 / 128, 1.0, 2.0, 2.0, 2.5]))
    counts = moments.histogram
    assert counts[0] == 1  # below 0
    assert (counts[1], counts[2], counts[129]) == (1, 1, 1)
    assert counts[BINS] == 2  # the last bin includes 2
    assert counts[-1] == 1
    assert moments.near_0 == 2
    assert moments.near_1 == 1


def test_numbers_of_little_variance_and_a_large_mean_are_exact() -> None:
    values = 1000 + torch.randn(4, 999, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-4
    running = Running()
    for part in values:
        running.add(part)
    assert running.variance == pytest.approx(float(values.var(unbiased=False)), rel=1e-6)


def variation_of(factors: torch.Tensor, real: torch.Tensor | None = None) -> dict[str, float]:
    real = torch.ones(factors.shape[0], 5, dtype=torch.bool) if real is None else real
    variation = Variation()
    for part, mask in zip(factors.split(2), real.split(2), strict=True):
        variation.add(part, mask)
    shares = variation.shares()
    assert shares is not None
    assert sum(shares.values()) == pytest.approx(1, abs=1e-6)
    return shares


@pytest.mark.parametrize(
    ("part", "shape"), [("samples", (4, 1, 1)), ("tokens", (4, 5, 1)), ("channels", (1, 1, 6)), ("rest", (4, 5, 6))]
)
def test_variation_is_told_apart_by_its_granularity(part: str, shape: tuple[int, ...]) -> None:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if part in ("tokens", "rest"):
        noise = noise - noise.mean(dim=1, keepdim=True)
    if part == "rest":
        noise = noise - noise.mean(dim=2, keepdim=True)
        noise = noise - noise.mean(dim=(0, 1), keepdim=True)
    factors = 1 + 0.1 * noise.expand(4, 5, 6)
    assert variation_of(factors)[part] == pytest.approx(1, abs=1e-5)


def test_variation_counts_real_positions_alone() -> None:
    real = torch.tensor([[True] * 5, [True, True, False, False, False], [True] * 5, [True] * 3 + [False] * 2])
    factors = torch.rand(4, 5, 6, generator=torch.Generator().manual_seed(0))
    shares = variation_of(factors, real)
    assert variation_of(factors.masked_fill(~real[..., None], 50.0), real) == shares
    values = factors[real].double()
    sample = np.concatenate([[float(factors[i][real[i]].mean())] * int(real[i].sum()) for i in range(4)])
    variance = float(values.var(unbiased=False))
    assert shares["samples"] == pytest.approx(sample.var() / variance, rel=1e-5)
    assert shares["channels"] == pytest.approx(float(values.mean(0).var(unbiased=False)) / variance, rel=1e-5)
    token = float(values.mean(1).var(unbiased=False)) / variance
    assert shares["tokens"] == pytest.approx(token - shares["samples"], rel=1e-5)


def test_a_constant_gate_has_no_variation() -> None:
    variation = Variation()
    variation.add(torch.full((3, 5, 6), 0.7), torch.ones(3, 5, dtype=torch.bool))
    assert variation.shares() is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_of_every_image_position_is_kept_for_each_image(models: Any, kind: str) -> None:
    collector, records = collected(with_gate(models, kind, "large"), kind)
    for task, images in (("vqa", 1), ("nlvr2", 2)):
        own = [record for _, record in records if record.task == task]
        grids = collector.positions[task, "encoder.ffn", 1].grids()
        assert grids.shape == (images, 2, 2)
        expected = torch.cat([record.on_images("encoder.ffn", 1) for record in own]).mean(0)
        assert np.allclose(grids, expected)
        assert len(np.unique(grids)) == grids.size


def test_masked_frames_do_not_count_and_clips_may_differ_in_length() -> None:
    means = PositionMeans()
    means.add(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]]))
    means.add(torch.tensor([[3.0]]), torch.tensor([[True]]))
    assert means.means()[:2].tolist() == [2.0, 2.0]
    assert np.isnan(means.means()[2])
    assert means.grids().shape == (1, 1, 3)


def test_examples_are_the_same_in_any_order_and_have_their_own_maps(models: Any) -> None:
    model = with_gate(models, "bart", "large")
    batches = [make_batch("vqa", 3, seed) for seed in range(3)]
    orders = []
    for order in (batches, batches[::-1]):
        collector = Collector(model, Words(), examples=4)
        for batch in order:
            collector.add(batch)
        orders.append(collector.examples["vqa"])
    assert [example.id for example in orders[0]] == [example.id for example in orders[1]]
    assert len({example.id for example in orders[0]}) == 4
    for example, other in zip(*orders, strict=True):
        _, seed, row = example.id.split("-")
        record = model(batches[int(seed)], return_gates=True)[1]
        for (site, layer), values in example.maps.items():
            assert np.allclose(values, record.on_images(site, layer)[int(row)].flatten().detach())
            assert np.array_equal(values, other.maps[site, layer])
        assert len(example.maps) == 4


def test_gates_that_are_the_same_everywhere_have_no_maps(models: Any) -> None:
    for gate in ("middleY", "small"):
        collector, records = collected(with_gate(models, "bart", gate), "bart")
        assert collector.positions == {}
        with pytest.raises(ValueError, match=r"has no factors for the positions of an image"):
            records[0][1].on_images("encoder.ffn", 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["vqa", "nlvr2", "caption"])
def test_gates_of_the_decoder_see_the_answers_of_the_model(models: Any, kind: str, task: str) -> None:
    placed = [Placement(["decoder.ffn", "decoder.cross.value"], partial(Gated, gate=partial(LargeGate, rank=4)))]
    model, batch = models(kind, placed), batch_of(kind, task)
    batch.labels = None
    answered = with_own_answers(model, Words(), batch)
    assert answered.labels is not None
    if task == "nlvr2":
        said = torch.tensor([9, 10])[model.choose(batch, (9, 10))]
        assert torch.equal(answered.labels[:, -1], said)
    else:
        beams, longest = {"vqa": (1, 20), "caption": (5, 20)}[task]
        ids = model.generate(batch, num_beams=beams, max_length=longest)[:, 1:]
        end = model.lm.config.eos_token_id
        for labels, sequence in zip(answered.labels.tolist(), ids.tolist(), strict=True):
            stop = sequence.index(end) + 1 if end in sequence else len(sequence)
            assert labels == sequence[:stop] + [IGNORED] * (len(sequence) - stop)
    collector = Collector(model, Words())
    collector.add(batch)
    cells = collector.cells()
    real = int((answered.labels != IGNORED).sum())
    assert cells[task, "decoder.ffn", 1, "target"].count == real * 32
    assert (task, "decoder.cross.value", 0, "image") in cells


def test_padding_counts_neither_for_the_variation_nor_for_image_positions(models: Any) -> None:
    model = with_gate(models, "bart", "large")
    model.visual.grid = None
    shown = torch.tensor([[True] * 4, [True, True, False, False], [True, False, False, False]])
    batch = replace(batch_of("bart"), feature_mask=shown)
    collector = Collector(model, Words())
    collector.add(batch)
    record = encode_with_gates(model, batch)
    factors, real = record.factors["encoder.attn", 1], ~record.kinds["padding"]
    expected = Variation()
    expected.add(factors, real)
    assert collector.variation["vqa", "encoder.attn", 1].shares() == expected.shares()
    means = factors.mean(-1)[:, -4:].masked_fill(~shown, 0).sum(0) / shown.sum(0)
    assert np.allclose(collector.positions["vqa", "encoder.attn", 1].means(), means)
    maps = {example.id: example.maps["encoder.attn", 1] for example in collector.examples["vqa"]}
    assert np.isnan(maps["vqa-0-2"]).tolist() == [False, True, True, True]


def test_a_pass_of_the_prompt_and_a_shared_input_are_not_counted(models: Any) -> None:
    gated = partial(Gated, gate=partial(LargeGate, rank=4))
    at = ["decoder.ffn", "decoder.cross.memory"]  # the latter is the input of keys and of values
    model = models("bart", [Placement(at, gated), Placement(["decoder.prompt"], partial(Prompt, length=4))])
    batch = batch_of("bart")
    collector = Collector(model, Words())
    collector.add(batch)
    cells = collector.cells()
    assert batch.labels is not None
    assert cells["vqa", "decoder.ffn", 0, "target"].count == int((batch.labels != IGNORED).sum()) * 32
    assert cells["vqa", "decoder.cross.memory", 0, "image"].count == 3 * 4 * 32


def test_a_small_gate_has_a_factor_per_sample_even_over_one_position() -> None:
    source = Source("decoder.ffn", 0, SmallGate(8), SmallGate(8), lambda factors: factors)
    assert source.axes(torch.ones(3, 1, 1), 1) == ("sample",)


def test_the_range_of_a_gate_follows_its_scale() -> None:
    assert limits(LargeGate(8, rank=2, scale=2.0)) == (0, 2)
    assert limits(MiddleYGate(8)) is None
    assert limits(MiddleYGate(8, form="paper", scale=0.5)) == (0.5, 1.0)
