"""Graphs of searches on a CPU: operations are recorded, and repeated as a GPU would.

Real graphs are replayed by tests/benchmarks/gpu.py.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace
from functools import partial
from itertools import chain

import pytest
import torch

from tests.benchmarks.generate import end_early
from tests.conformance.bench import Bench, make_batch
from tests.conformance.cases import CASES
from tests.recorded import check_device, record_on_tapes
from tests.runs import tiny_module
from vlpet_lightning import generation_graphs
from vlpet_lightning.cuda_graphs import TEXT_MULTIPLE
from vlpet_lightning.generation_graphs import GenerationGraphs
from vlpet_lightning.model import _may_read_padding
from vlpet_lightning.pet import VLPET, LargeGate, SmallGate

LENGTH = 7
RAISED = {"bart": 2.4, "t5": 5.5}  # end token's logit, so that answers end at different lengths


@pytest.fixture
def tapes(monkeypatch):
    """Record on a CPU; returns the tapes, each with the number of its replays."""
    return record_on_tapes(monkeypatch)


@pytest.fixture(params=["bart", "t5"])
def kind(request):
    return request.param


def models(case, kind):
    """Return a model in evaluation mode, and its graphed copy."""
    plain, graphed = (Bench(next(c for c in CASES if c.name == case), kind).loud().eval() for _ in range(2))
    graphed.load_state_dict(plain.state_dict())
    graphed.use_generation_graphs()
    graphed.generation_graphs.device = "cpu"
    return plain, graphed


def batch_of(kind, seed, text=0, size=3):
    """Return a batch of other features and, in its second sample, another text."""
    batch = make_batch(kind, "vqa", size=size)
    generator = torch.Generator().manual_seed(seed)
    ids = batch.input_ids.clone()
    ids[-1, 1] = 7 + seed
    more = torch.full((size, text), 1)
    more[0] = 8
    features = torch.randn(batch.features.shape, generator=generator)
    return replace(batch, input_ids=torch.cat([ids, more], dim=1), features=features)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    "case",
    [
        "vlpet-large",
        pytest.param("vlpet-small", marks=pytest.mark.slow),
        "prompt-decoder",
        pytest.param("ladder", marks=pytest.mark.slow),
    ],
)
def test_replayed_searches_give_the_same_answers(kind, case, beams, tapes):
    plain, graphed = models(case, kind)
    found = []
    for seed in range(5):
        batch = batch_of(kind, seed, text=seed % 2)
        settings = {"num_beams": beams, "max_length": LENGTH, "answers": beams}
        found.append(graphed.generate(batch, **settings))
        assert torch.equal(found[-1], plain.generate(batch, **settings))
    assert len({tuple(answer.flatten().tolist()) for answer in found}) > 1
    assert sum(tape.replays for tape in tapes) > len(tapes)


def test_a_search_ends_with_its_last_sample(kind, tapes):
    plain, graphed = models("vlpet-large", kind)
    for model in (plain, graphed):
        end_early(model, RAISED[kind])
    lengths = set()
    for seed in range(8):
        before = sum(tape.replays for tape in tapes)
        batch = batch_of(kind, seed, size=1)
        found = graphed.generate(batch, num_beams=2, max_length=LENGTH)
        assert torch.equal(found, plain.generate(batch, num_beams=2, max_length=LENGTH))
        lengths.add(sum(tape.replays for tape in tapes) - before)
    assert len(tapes) == LENGTH - 1
    assert len(lengths - {0}) > 1


def test_weights_are_read_at_every_replay_and_recorded_anew_where_they_move(kind, tapes):
    plain, graphed = models("vlpet-large", kind)
    settings = {"num_beams": 2, "max_length": LENGTH}
    for _ in range(2):
        before = graphed.generate(batch_of(kind, 0), **settings)
    with torch.no_grad():
        for model in (plain, graphed):
            for parameter in model.unit_parameters().values():
                parameter.mul_(-2)
    after = graphed.generate(batch_of(kind, 0), **settings)
    assert torch.equal(after, plain.generate(batch_of(kind, 0), **settings))
    assert not torch.equal(after, before)
    assert len(tapes) == LENGTH - 1
    for parameter in chain(graphed.parameters(), graphed.buffers()):
        parameter.data = parameter.data.clone()
    for _ in range(2):
        assert torch.equal(graphed.generate(batch_of(kind, 0), **settings), after)
    assert len(tapes) == 2 * (LENGTH - 1)
    assert len({tape.recorder for tape in tapes}) == 2  # the graphs of the first have given up its memory


def test_tasks_and_settings_have_recordings_of_their_own(kind, tapes):
    plain, graphed = models("hyperformer-block", kind)
    found = set()
    for _ in range(3):
        for task, beams in (("vqa", 2), ("caption", 2), ("vqa", 3)):
            batch, settings = replace(batch_of(kind, 0), task=task), {"num_beams": beams, "max_length": LENGTH}
            answers = graphed.generate(batch, **settings)
            assert torch.equal(answers, plain.generate(batch, **settings))
            found.add((task, tuple(answers.flatten().tolist())))
    assert len(tapes) == 3 * (LENGTH - 1)
    assert len({answer for _, answer in found}) > 1


def test_weights_converted_for_autocast_are_not_kept(kind, tapes):
    plain, graphed = models("vlpet-large", kind)
    settings = {"num_beams": 2, "max_length": LENGTH}
    batch = batch_of(kind, 0)
    with torch.autocast("cpu", torch.bfloat16):
        graphed.loss(make_batch(kind, "vqa", size=3))  # fills the cache of converted weights
        for _ in range(2):
            before = graphed.generate(batch, **settings)
    with torch.no_grad():
        for model in (plain, graphed):
            for parameter in model.unit_parameters().values():
                parameter.mul_(-2)
    with torch.autocast("cpu", torch.bfloat16):
        after = graphed.generate(batch, **settings)
        assert torch.equal(after, plain.generate(batch, **settings))
    assert not torch.equal(after, before)
    assert len(tapes) == LENGTH - 1


def test_a_recorder_that_has_failed_is_not_used_again(kind, tapes, monkeypatch):
    plain, graphed = models("vlpet-large", kind)
    settings = {"num_beams": 2, "max_length": LENGTH}
    record, made = generation_graphs.Recorder.record, []

    def failing(recorder, calls):
        made.append(recorder)
        if len(made) == 1:
            raise RuntimeError("out of luck")
        return record(recorder, calls)

    monkeypatch.setattr(generation_graphs.Recorder, "record", failing)
    batch = batch_of(kind, 0)
    graphed.generate(batch, **settings)
    with pytest.raises(RuntimeError, match="out of luck"):
        graphed.generate(batch, **settings)
    assert torch.equal(graphed.generate(batch, **settings), plain.generate(batch, **settings))
    assert len(set(made)) == 2


def test_copies_record_for_themselves(kind, tapes):
    plain, graphed = models("vlpet-large", kind)
    settings = {"num_beams": 2, "max_length": LENGTH}
    for _ in range(2):
        graphed.generate(batch_of(kind, 0), **settings)
    for twin in (copy.deepcopy(graphed), pickle.loads(pickle.dumps(graphed))):
        assert twin.generation_graphs.recordings == {}
        assert twin.generation_graphs.module is twin
        before = len(tapes)
        for seed in range(3):
            found = twin.generate(batch_of(kind, seed), **settings)
            assert torch.equal(found, plain.generate(batch_of(kind, seed), **settings))
        assert len(tapes) == before + LENGTH - 1


def test_similar_lengths_share_a_recording_unless_units_see_the_padding(kind, tapes):
    for case, shared in (("vlpet-large", True), ("vlpet-small", False)):
        graphed = models(case, kind)[1]
        batch = batch_of(kind, 0)
        longest = TEXT_MULTIPLE - batch.input_ids.shape[1] % TEXT_MULTIPLE
        for text in (*range(longest), *range(longest)):
            graphed.generate(batch_of(kind, 0, text=text), num_beams=1, max_length=3)
        recordings = graphed.generation_graphs.recordings
        assert len(recordings) == (1 if shared else longest)
        assert all(recordings.values())


def test_units_limited_to_some_positions_allow_padding_unless_they_read_it():
    units = [VLPET(8, rank=4, gate=gate) for gate in (partial(LargeGate, rank=4), SmallGate)]
    for unit in units:
        unit.limit_to("prefix")
    assert [any(map(_may_read_padding, unit.modules())) for unit in units] == [False, True]


def test_units_that_are_disabled_have_a_recording_of_their_own(kind, tapes):
    plain, graphed = models("vlpet-large", kind)
    for enabled in (True, False, True, False, True):
        plain.enabled = graphed.enabled = enabled
        settings = {"num_beams": 2, "max_length": LENGTH}
        batch = batch_of(kind, 0)
        assert torch.equal(graphed.generate(batch, **settings), plain.generate(batch, **settings))
    assert len(tapes) == 2 * (LENGTH - 1)


def test_under_autocast(kind, tapes):
    plain, graphed = models("vlpet-large", kind)
    settings = {"num_beams": 2, "max_length": LENGTH}
    for bf16 in (False, True, True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            batch = batch_of(kind, 0)
            assert torch.equal(graphed.generate(batch, **settings), plain.generate(batch, **settings))
    assert len(tapes) == 2 * (LENGTH - 1)


def test_shapes_beyond_the_limit_run_without_a_graph_which_is_said_once(kind, tapes, monkeypatch, recwarn):
    monkeypatch.setattr(generation_graphs, "MOST", 1)
    warnings.simplefilter("always")
    plain, graphed = models("vlpet-large", kind)
    for size in (2, 2, 3, 3, 4, 4):
        batch = make_batch(kind, "vqa", size=size)
        found = graphed.generate(batch, num_beams=2, max_length=4)
        assert torch.equal(found, plain.generate(batch, num_beams=2, max_length=4))
    said = [str(warning.message) for warning in recwarn if "generation_graphs" in str(warning.message)]
    assert said == ["generation_graphs: batches of further shapes run without a graph (searches recorded: 1)"]
    assert len(tapes) == 3


def test_recordings_made_in_inference_mode_serve_outside_of_it(kind, tapes):
    plain, graphed = models("vlpet-large", kind)
    for seed in range(4):
        with torch.inference_mode(seed < 2):
            found = graphed.generate(batch_of(kind, seed), num_beams=2, max_length=LENGTH)
        assert torch.equal(found, plain.generate(batch_of(kind, seed), num_beams=2, max_length=LENGTH))


def test_training_mode_and_a_cpu_record_nothing(kind, tapes):
    graphed = models("vlpet-large", kind)[1]
    for _ in range(2):
        graphed.train().generate(batch_of(kind, 0), num_beams=1, max_length=3)
    graphed.generation_graphs.device = "cuda"
    for _ in range(2):
        graphed.eval().generate(batch_of(kind, 0), num_beams=1, max_length=3)
    assert tapes == []


@pytest.mark.parametrize(
    "case",
    [
        "vlpet-large",
        "hyperformer-block",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("prompt-both", "compacter", "ladder")),
    ],
)
def test_training_and_searching_stay_on_the_device(kind, case):
    check_device(Bench(next(c for c in CASES if c.name == case), kind).fresh(), make_batch(kind, "vqa", size=3))


def test_the_setting_reaches_the_model(tiny_backbone):
    module = tiny_module(tiny_backbone, generation_graphs=True)
    module.configure_model()
    assert isinstance(module.built().generation_graphs, GenerationGraphs)
    assert tiny_module(tiny_backbone).generation_graphs is False
