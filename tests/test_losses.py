"""Losses computed from decoder states, in chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conformance.bench import bare
from tests.conformance.bench import make_batch as conformance_batch
from tests.runs import make_batch
from vlpet_lightning import losses
from vlpet_lightning.batch import IGNORED
from vlpet_lightning.losses import sample_factors, token_losses


@pytest.fixture
def problem() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "states": torch.randn(11, 6, generator=generator),
        "weight": torch.randn(23, 6, generator=generator),
        "bias": torch.randn(23, generator=generator),
        "labels": torch.randint(23, (11,), generator=generator),
        "factors": torch.rand(11, generator=generator),
    }


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("factors", [True, False])
@pytest.mark.parametrize("chunk", [1, 4 * 23, 2**24])
def test_loss_and_gradients_are_those_of_cross_entropy(problem, chunk, factors, softcap, monkeypatch):
    monkeypatch.setattr(losses, "CPU_CHUNK", chunk)
    if not factors:
        del problem["factors"]
    found, expected = ({name: problem[name].clone().requires_grad_() for name in ("states", "weight")} for _ in "ab")
    loss = token_losses(**(problem | found), softcap=softcap)
    logits = F.linear(expected["states"], expected["weight"], problem["bias"])
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    plain = F.cross_entropy(logits, problem["labels"], reduction="none")
    plain = (plain * problem["factors"] if factors else plain).sum()
    torch.testing.assert_close(loss, plain)
    (3 * loss).backward()
    (3 * plain).backward()
    for name in found:
        torch.testing.assert_close(found[name].grad, expected[name].grad)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("bias", [True, False])
def test_in_bf16_the_padding_of_the_vocabulary_has_no_part_in_loss_and_gradients(problem, bias, softcap, monkeypatch):
    monkeypatch.setattr(losses, "CPU_CHUNK", 4 * 24)
    problem["weight"] += 3 * problem["states"].mean(dim=0)  # zeros are not the smallest logits
    problem["bias"] = problem["bias"] - 20 if bias else None
    found, expected = ({name: problem[name].clone().requires_grad_() for name in ("states", "weight")} for _ in "ab")
    with torch.autocast("cpu", torch.bfloat16):
        loss = token_losses(**(problem | found), softcap=softcap)
    logits = F.linear(expected["states"], expected["weight"], problem["bias"])
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    plain = (F.cross_entropy(logits, problem["labels"], reduction="none") * problem["factors"]).sum()
    torch.testing.assert_close(loss, plain, rtol=2e-2, atol=0)
    loss.backward()
    plain.backward()
    for name in found:
        difference = found[name].grad - expected[name].grad
        assert difference.norm() < 2e-2 * expected[name].grad.norm()


def test_only_one_chunk_of_logits_exists(problem, monkeypatch):
    monkeypatch.setattr(losses, "CPU_CHUNK", 4 * 23)
    shapes = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            shapes.extend(t.shape for t in (result,) if isinstance(t, torch.Tensor))
            return result

    with Shapes():
        token_losses(**(problem | {"states": problem["states"].requires_grad_()})).backward()
    rows = [shape[0] for shape in shapes if shape[1:] == (23,) and shape != problem["weight"].t().shape]
    assert rows
    assert max(rows) == 4


def test_without_gradients_none_are_computed(problem, monkeypatch):
    problem["states"].requires_grad_()
    called = []
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: called.append(args))
    with torch.no_grad():
        loss = token_losses(**problem)
    assert not loss.requires_grad
    assert not called


@pytest.mark.parametrize("kind", ["bart", "t5"])
@pytest.mark.parametrize("task", ["vqa", "caption", "nlvr2"])
def test_the_loss_is_that_of_the_logits(kind, task):
    model, batch = bare(kind), conformance_batch(kind, task)
    factors, count = sample_factors(batch.labels, {"caption": "token"}.get(task, "weighted_sample"), batch.weights)
    plain = F.cross_entropy(model(batch).flatten(0, 1), batch.labels.flatten(), reduction="none").view_as(batch.labels)
    expected = plain.sum() if factors is None else (plain.sum(dim=1) * factors).sum()
    total, found = model.loss_terms(batch)
    torch.testing.assert_close(total, expected)
    assert found == count


def test_targets_follow_the_labels():
    batch = make_batch("gqa", 3, 0)
    moved = batch.to("cpu")
    expected = (batch.labels.flatten() != IGNORED).nonzero().squeeze(1)
    assert torch.equal(moved.targets(), expected)
    labels = torch.full_like(batch.labels, IGNORED)
    labels[0, 0] = 5
    assert replace(moved, labels=labels).targets().tolist() == [0]
    with pytest.raises(ValueError, match="no labels"):
        replace(moved, labels=None).targets()
