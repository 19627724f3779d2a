"""Our models compared with tensors computed by the original implementation."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from tests.parity import Parity, largest, parity_files
from vlpet_lightning.interop import original_tensors
from vlpet_lightning.optim import HFAdamW, decay_groups, linear_schedule, spared_by_the_original

FILES = parity_files()
# gradients that are zero in exact arithmetic are rounding noise in both
NOISE = 5e-7


@pytest.fixture
def parity(request):
    return Parity(request.param)


def with_tensor(key):
    """Parametrise over the files that contain a tensor."""
    found = [path for path in FILES if holds(path, key)]
    assert found, f"no file holds {key}"
    return pytest.mark.parametrize("parity", found, ids=[path.stem for path in found], indirect=True)


def holds(path, key):
    with safe_open(path, framework="pt") as file:
        return key in file.keys()  # noqa: SIM118  # not a dict


@with_tensor("output.encoder_last_hidden_state")
def test_encoder_states_agree(parity):
    assert largest(parity.model.encode(parity.batch()), parity.tensors["output.encoder_last_hidden_state"]) < 2e-5


@with_tensor("output.encoder_layer.0")
def test_every_encoder_layer_agrees(parity):
    outputs = []
    for layer in parity.model.backbone.layers(parity.model.lm)["encoder"]:
        layer.register_forward_hook(
            lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
    parity.model.encode(parity.batch())
    for number, output in enumerate(outputs):
        assert largest(output, parity.tensors[f"output.encoder_layer.{number}"]) < 2e-5


@with_tensor("output.visual_embedding")
def test_the_visual_embedding_agrees(parity):
    batch = parity.batch()
    embedded = parity.model.visual(batch.features, batch.boxes, parity.model.backbone.token_embedding(parity.model.lm))
    assert largest(embedded, parity.tensors["output.visual_embedding"]) < 2e-5


@with_tensor("output.logits")
def test_logits_agree(parity):
    expected = parity.tensors["output.logits"]
    assert largest(parity.model(parity.batch()), expected) < 2e-4


@pytest.mark.parametrize("task", ["vqa", "gqa", "caption"])
@with_tensor("output.loss_vqa")
def test_losses_of_every_task_agree(parity, task):
    expected = parity.tensors[f"output.loss_{task}"]
    batch = parity.batch()
    if parity.model.may_skip_parameters and batch.task != task:
        # there the losses are computed from logits of the file's own task; our batches have a single task
        pytest.skip("another task's loss of this task's modules")
    assert largest(parity.model.loss(parity.batch(task)), expected) < 1e-5


@with_tensor("output.loss")
def test_the_loss_and_every_gradient_agree(parity):
    expected = parity.tensors["output.loss"]
    loss = parity.model.loss(parity.batch())
    assert largest(loss, expected) < 1e-5
    loss.backward()
    ours, theirs = parity.gradients(), parity.group("grad")
    assert set(theirs) <= set(ours)
    for name, gradient in theirs.items():
        scale = gradient.abs().max().item()
        assert largest(ours[name], gradient) <= 1e-3 * scale + NOISE, name


@with_tensor("output.loss")
def test_the_same_parameters_are_trained(parity):
    unused = set(json.loads(parity.metadata.get("unused", "[]")))  # parameters that the original never reads
    expected = set(json.loads(parity.metadata["trainable"])) - unused
    trained = {name: p for name, p in parity.model.named_parameters() if p.requires_grad}
    # an adapter shared by the tasks is listed only under the first task
    listed = {name for name, _ in original_tensors(list(parity.group("weight")), trained)}
    assert expected <= listed
    left_out = sum(parity.group("weight")[name].numel() for name in unused)
    assert sum(p.numel() for p in trained.values()) == int(parity.metadata["n_trainable"]) - left_out
    assert sum(p.numel() for p in parity.model.parameters()) == int(parity.metadata["n_total"]) - left_out


@pytest.mark.parametrize("beams", [1, 5])
@with_tensor("output.generate_beams5")
def test_generated_tokens_are_identical(parity, beams):
    expected = parity.tensors[f"output.generate_beams{beams}"]
    length = int(parity.metadata.get("max_length", 10))
    assert torch.equal(parity.model.generate(parity.batch(), num_beams=beams, max_length=length), expected)


@with_tensor("output.nlvr_pred")
def test_the_choice_between_true_and_false_agrees(parity):
    expected = parity.tensors["output.nlvr_pred"]
    choices = [int(parity.metadata["false_id"]), int(parity.metadata["true_id"])]
    assert torch.equal(parity.model.choose(parity.batch(), choices), expected)


@with_tensor("optim.losses")
def test_four_steps_of_the_original_optimiser_agree(parity):
    losses = parity.tensors["optim.losses"]
    recipe = json.loads(parity.metadata["optim"])
    named = [(name, p) for name, p in parity.model.named_parameters() if p.requires_grad]
    groups = decay_groups(named, lambda name, _: spared_by_the_original(name), recipe["weight_decay"])
    optimizer = HFAdamW(groups, lr=recipe["lr"], betas=tuple(recipe["betas"]), eps=recipe["eps"])
    schedule = linear_schedule(optimizer, recipe["total"], recipe["warmup"] / recipe["total"])
    for step in range(recipe["steps"]):
        loss = parity.model.loss(parity.batch())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], recipe["clip"])
        assert loss.item() == pytest.approx(losses[step].item(), abs=2e-5)
        assert norm.item() == pytest.approx(parity.tensors["optim.grad_norms"][step].item(), rel=1e-4)
        assert schedule.get_last_lr()[0] == pytest.approx(parity.tensors["optim.lrs"][step].item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    weights = dict(original_tensors(list(parity.group("weight")), {n: p.detach() for n, p in named}))
    for name, weight in parity.group("optim.weight_after_4").items():
        # Adam's normalisation amplifies gradients that are rounding noise; all others agree to rounding
        assert largest(weights[name], weight) < 2e-5, name
