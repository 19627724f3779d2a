"""Decoder-only models with CUDA graphs, recorded on a CPU (tests/recorded.py)."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.backbones.tiny_vlm import MODELS, PAD, build, draw, with_features
from tests.recorded import check_device, record_on_tapes, run_instead
from vlpet_lightning.cuda_graphs import TARGET_MULTIPLE, TEXT_MULTIPLE
from vlpet_lightning.pet import VLPET, LargeGate, ParallelAdapter, Placement

UNITS = [
    Placement(["decoder.attn", "decoder.ffn"], partial(VLPET, rank=4, gate=partial(LargeGate, rank=4)), "prefix"),
    Placement("decoder.attn.value", partial(ParallelAdapter, rank=4)),
]
RULES = ("pet", "visual_embedding")


@pytest.fixture(params=sorted(MODELS))
def name(request):
    return request.param


def pair(name):
    """Return a model with units far from their start, and its copy."""
    models = []
    for _ in range(2):
        model = build(name, UNITS, RULES)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.unit_parameters().values():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        models.append(model)
    return models


def batch_of(name, model, seed, text=0):
    """Return a batch with ``text`` more tokens in its first sample."""
    batch, pixels = draw(1, seed=seed)
    more = torch.full((len(batch), text), PAD)
    more[0] = 11
    batch = with_features(name, model, batch, pixels)
    return replace(batch, input_ids=torch.cat([batch.input_ids, more], dim=1))


def test_replayed_searches_give_the_same_answers(name, monkeypatch):
    plain, graphed = pair(name)
    tapes = record_on_tapes(monkeypatch)
    graphed.use_generation_graphs()
    graphed.generation_graphs.device = "cpu"
    found = []
    for seed in range(4):
        batch = batch_of(name, plain, seed, text=seed % 2)
        found.append(graphed.generate(batch, num_beams=2, max_length=6, answers=2))
        assert torch.equal(found[-1], plain.generate(batch, num_beams=2, max_length=6, answers=2))
    assert len({tuple(answer.flatten().tolist()) for answer in found}) > 1
    assert len(tapes) == 5
    assert sum(tape.replays for tape in tapes) > len(tapes)


def test_losses_and_gradients_do_not_depend_on_the_padding(name, monkeypatch):
    plain, graphed = (model.train() for model in pair(name))
    recorded = run_instead(monkeypatch)
    graphed.use_cuda_graphs()
    for seed, text in enumerate((0, 2, 1)):
        batch = batch_of(name, plain, seed, text)
        results = []
        for model in (plain, graphed):
            model.zero_grad()
            loss = model.loss(batch)
            loss.backward()
            results.append((loss, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert {shapes[0][1] % TEXT_MULTIPLE for _, shapes in recorded} == {0}
    assert {shapes[-1][1] % TARGET_MULTIPLE for _, shapes in recorded} == {0}


def test_training_and_searching_stay_on_the_device(name):
    model = build(name, UNITS, RULES)
    check_device(model, batch_of(name, model, 0))
