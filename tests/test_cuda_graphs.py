"""Graphs of training steps: shapes, padding and checks. The replay itself needs a GPU (tests/benchmarks/gpu.py)."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.conformance.bench import Bench, make_batch
from tests.conformance.cases import CASES
from tests.recorded import run_instead
from tests.runs import make_batch as make_training_batch
from tests.runs import quiet_trainer, tiny_module
from vlpet_lightning import cuda_graphs
from vlpet_lightning.cuda_graphs import TEXT_MULTIPLE, pad_text


@pytest.fixture(params=["bart", "t5"])
def kind(request):
    return request.param


@pytest.fixture
def recorded(monkeypatch):
    """Run the recorded function instead of a graph; returns what was recorded."""
    return run_instead(monkeypatch)


def still(case, kind):
    """Return a model in training mode without dropout, and its graphed copy."""
    models = []
    for _ in range(2):
        model = Bench(next(c for c in CASES if c.name == case), kind).loud().train()
        for module in model.modules():
            for name in ("dropout", "attention_dropout", "activation_dropout", "dropout_rate"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        models.append(model)
    models[1].load_state_dict(models[0].state_dict())
    models[1].use_cuda_graphs()
    return models


def step(model, batch):
    model.zero_grad()
    loss = model.loss(batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def lengthened(batch, text):
    """Return the batch with ``text`` more tokens in its first sample."""
    more = torch.full((len(batch), text), 1)
    more[0] = 7
    return replace(batch, input_ids=torch.cat([batch.input_ids, more], dim=1))


@pytest.mark.parametrize("case", ["vlpet-large", "vlpet-small", "hyperformer-block", "prompt-decoder"])
def test_losses_and_gradients_do_not_depend_on_the_padding(kind, case, recorded):
    plain, graphed = still(case, kind)
    for text in (0, 1, 3):
        batch = lengthened(make_batch(kind, "vqa", size=3), text)
        batch = replace(batch, labels=batch.labels[:, : text + 1])
        expected, found = step(plain, batch), step(graphed, batch)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert recorded


@pytest.mark.parametrize(("case", "shared"), [("vlpet-large", True), ("vlpet-small", False)])
def test_batches_of_similar_lengths_share_a_graph_unless_units_see_the_padding(kind, case, shared, recorded):
    graphed = still(case, kind)[1]
    batch = make_batch(kind, "vqa", size=3)
    lengths = [batch.input_ids.shape[1] + more for more in range(TEXT_MULTIPLE + 1)]
    for more in range(TEXT_MULTIPLE + 1):
        for _ in range(2):
            graphed.loss(lengthened(batch, more))
    texts = [shapes[0][1] for _, shapes in recorded]
    assert texts == (sorted({-(-length // TEXT_MULTIPLE) * TEXT_MULTIPLE for length in lengths}) if shared else lengths)


def test_shapes_beyond_the_limit_run_without_a_graph_which_is_said_once(kind, recorded, monkeypatch, recwarn):
    monkeypatch.setattr(cuda_graphs, "MOST", 1)
    plain, graphed = still("vlpet-large", kind)
    for size in (2, 3, 4):
        batch = make_batch(kind, "vqa", size=size)
        torch.testing.assert_close(step(graphed, batch), step(plain, batch), rtol=1e-4, atol=1e-6)
    said = [str(warning.message) for warning in recwarn if "cuda_graphs" in str(warning.message)]
    assert said == ["cuda_graphs: batches of further shapes run without a graph (1 exist)"]
    assert len(recorded) == 1


def test_copies_record_for_themselves(kind, recorded):
    graphed, batch = still("vlpet-large", kind)[1], make_batch(kind, "vqa")
    expected = step(graphed, batch)
    twin = copy.deepcopy(graphed)
    assert twin.graphs.graphs == {}
    assert all(one is other for one, other in zip(twin.graphs.parameters, trained(twin), strict=True))
    torch.testing.assert_close(step(twin, batch), expected)
    assert len(recorded) == 2


def test_evaluation_and_generation_record_nothing(kind, recorded):
    graphed, batch = still("vlpet-large", kind)[1], make_batch(kind, "vqa")
    with torch.no_grad():
        graphed.loss(batch)
    graphed.eval().loss(batch)
    graphed.generate(batch, num_beams=2, max_length=4)
    graphed.choose(batch, [3, 4])
    assert recorded == []


def test_a_text_mask_is_padded_with_masked_positions(kind):
    batch = make_batch(kind, "vqa", size=2)
    mask = torch.ones_like(batch.input_ids, dtype=torch.bool)
    longer = pad_text(replace(batch, text_mask=mask), pad=9)
    width = mask.shape[1]
    assert longer.input_ids.shape == longer.text_mask.shape == (2, TEXT_MULTIPLE)
    assert longer.text_mask[:, :width].all()
    assert not longer.text_mask[:, width:].any()
    assert (longer.input_ids[:, width:] == 9).all()


def test_a_trainer_without_a_gpu_is_refused(tmp_path, tiny_backbone):
    module = tiny_module(tiny_backbone, cuda_graphs=True)
    with pytest.raises(ValueError, match="cuda_graphs needs a GPU, but the trainer runs on cpu"):
        quiet_trainer(tmp_path).fit(module, [make_training_batch("vqa", 2, 0)])


def test_evaluation_without_a_gpu_is_not_refused(tmp_path, tiny_backbone):
    module = tiny_module(tiny_backbone, cuda_graphs=True)
    trainer = quiet_trainer(tmp_path)
    trainer.strategy.connect(module)
    trainer.state.fn = "test"
    module._trainer = trainer
    module.configure_model()
    assert module.built().graphs is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world_size": 2}, "cuda_graphs supports a single GPU, but the trainer has 2"),
        ({"accumulate_grad_batches": 4}, "trainer.accumulate_grad_batches is 4: set it to 1"),
    ],
)
def test_several_gpus_and_accumulated_gradients_are_refused(change, message):
    settings = {"strategy": SimpleNamespace(root_device=torch.device("cuda")), "world_size": 1}
    cuda_graphs.check_trainer(SimpleNamespace(**settings, accumulate_grad_batches=1))
    with pytest.raises(ValueError, match=message):
        cuda_graphs.check_trainer(SimpleNamespace(**(settings | {"accumulate_grad_batches": 1} | change)))


def test_gradients_that_a_callback_begins_to_accumulate_are_refused_at_the_epoch(tiny_backbone):
    module = tiny_module(tiny_backbone, cuda_graphs=True)
    device = SimpleNamespace(root_device=torch.device("cuda"))
    module._trainer = SimpleNamespace(strategy=device, world_size=1, accumulate_grad_batches=2)
    with pytest.raises(ValueError, match="accumulate_grad_batches is 2"):
        module.on_train_epoch_start()
