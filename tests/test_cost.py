"""Cost of a config, compared with what training writes and uses."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conformance.cases import HYPER, at
from tests.runs import Batches, make_batch, quiet_trainer, tiny_module
from vlpet_lightning.cost import Step, cost_of, default_step
from vlpet_lightning.flops import sizes_of, training_flops
from vlpet_lightning.interop.export.pet_files import save_pet
from vlpet_lightning.interop.export.record import WEIGHTS
from vlpet_lightning.memory import size
from vlpet_lightning.pet import HyperFormer, LadderSideNetwork, Prompt

STEP = Step("gqa", 3, 7, 4)
CASES = {
    "vlpet_large": {},
    "full": {"placements": [], "trainable": ["all"]},
    "frozen": {"placements": [], "trainable": ["visual_embedding"]},
    "adamw": {"optimizer": torch.optim.AdamW},
    "ladder": {"placements": [at(("side",), LadderSideNetwork)], "trainable": ["pet", "visual_embedding"]},
    "hyperformer": {"placements": [at(("encoder.attn", "decoder.ffn"), HyperFormer, **HYPER)], "trainable": ["pet"]},
}


def tensors(value):
    """Yield all tensors of nested containers."""
    if isinstance(value, Tensor):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from tensors(item)


@pytest.mark.parametrize("name", [name for name in CASES if name != "hyperformer"])  # one task gets no gradient
def test_a_checkpoint_holds_the_bytes_that_were_said(tiny_backbone, tmp_path, name):
    module = tiny_module(tiny_backbone, **CASES[name])
    cost = cost_of(module, STEP)
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, Batches([make_batch("gqa", 3, 0)]))
    path = tmp_path / "run.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    parts = [saved["state_dict"], saved["vlpet"]["added_rows"], saved["optimizer_states"]]
    assert sum(map(size, tensors(parts))) == cost.checkpoint
    assert 0 < path.stat().st_size - cost.checkpoint < 30_000 + 1_500 * len(list(tensors(parts)))
    trained = [p for p in module.parameters() if p.requires_grad]
    assert cost.gradients == sum(map(size, trained))
    assert cost.optimizer == sum(map(size, tensors(saved["optimizer_states"])))
    assert cost.weights == sum(map(size, (*module.parameters(), *module.buffers())))


def test_an_export_holds_the_bytes_that_were_said(tiny_backbone, tmp_path):
    module = tiny_module(tiny_backbone)
    cost = cost_of(module, STEP)
    module.configure_model()
    save_pet(module, tmp_path / "out")
    assert sum(map(size, load_file(tmp_path / "out" / WEIGHTS).values())) == cost.export


def test_the_module_stays_unbuilt_and_without_fake_tensors(tiny_backbone):
    module = tiny_module(tiny_backbone)
    cost = cost_of(module, STEP)
    assert module.model is None
    module.configure_model()
    assert type(next(module.parameters()).data) is Tensor
    assert cost_of(module, STEP).activations == cost.activations


def test_flops_are_those_of_the_throughput(tiny_backbone):
    module = tiny_module(tiny_backbone)
    cost = cost_of(module, STEP)
    module.configure_model()
    assert cost.encoder_tokens == 7 + 4
    assert cost.flops == training_flops(sizes_of(module.model), images=4, source=11, target=4)
    assert cost.parameters.trainable == sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_prompts_and_second_images_are_encoder_tokens(tiny_backbone):
    prompt = [at(("encoder.prompt",), Prompt, length=3, hidden=10)]
    assert cost_of(tiny_module(tiny_backbone, placements=prompt), STEP).encoder_tokens == 3 + 7 + 4
    assert cost_of(tiny_module(tiny_backbone), Step("nlvr2", 3, 7, 4)).encoder_tokens == 7 + 2 * 4


def test_more_vectors_are_pooled_and_frames_are_not(tiny_backbone):
    few, many = (cost_of(tiny_module(tiny_backbone), Step("gqa", 3, 7, 4, vectors=n)) for n in (4, 16))
    assert few.encoder_tokens == many.encoder_tokens
    frames = cost_of(tiny_module(tiny_backbone, grid=None), Step("tvc", 3, 7, 4))
    assert frames.encoder_tokens == 7 + 64


def test_dropout_of_the_config_is_that_of_the_step(tiny_backbone):
    with_dropout, without = (cost_of(tiny_module(tiny_backbone, dropout=p), STEP) for p in (0.1, 0.0))
    assert with_dropout.activations > without.activations


def test_frozen_weights_in_bfloat16_take_less_memory(tiny_backbone):
    half, whole = (
        cost_of(tiny_module(tiny_backbone, frozen_dtype=dtype), Step("gqa", 3, 7, 4, precision="bf16-mixed"))
        for dtype in ("bfloat16", "float32")
    )
    assert half.weights < whole.weights
    assert half.activations < whole.activations  # no copies of frozen weights
    assert (half.checkpoint, half.gradients) == (whole.checkpoint, whole.gradients)


def test_the_memory_is_the_sum_of_its_parts(tiny_backbone):
    cost = cost_of(tiny_module(tiny_backbone), STEP)
    assert cost.memory == cost.weights + cost.gradients + cost.optimizer + cost.activations
    assert cost.as_dict()["memory"] == cost.memory
    assert cost.checkpoint == cost.export + cost.optimizer
    assert cost.build_seconds > 0


def test_an_optimiser_with_unknown_state_leaves_sums_out(tiny_backbone):
    class Picky(torch.optim.SGD):
        def step(self, closure=None):
            return self.param_groups[0]["params"][0].grad.sum().item()

    cost = cost_of(tiny_module(tiny_backbone, optimizer=partial(Picky, lr=0.1)), STEP)
    assert (cost.optimizer, cost.memory, cost.checkpoint) == (None, None, None)
    assert cost.activations > 0


def test_a_task_without_units_is_refused(tiny_backbone):
    with pytest.raises(ValueError, match=r"HyperFormer at site 'encoder.attn' has parts for vqa, nlvr2, caption alone"):
        cost_of(tiny_module(tiny_backbone, **CASES["hyperformer"]), STEP)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "chess"}, "unknown task 'chess'"),
        ({"samples": 0}, "samples must be .*got 0"),
        ({"text": -1}, "text must be .*got -1"),
        ({"vectors": 0}, "vectors must be .*got 0"),
    ],
)
def test_a_step_out_of_range_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Step(**({"task": "gqa", "samples": 1, "text": 1, "target": 1} | changes))


def test_the_default_step_is_the_longest_of_the_task():
    settings = {"data": {"init_args": {"batch_size": 500}}, "trainer": {"precision": "bf16-mixed"}}
    assert default_step("caption", settings) == Step("caption", 416, 40, 40, precision="bf16-mixed")
    assert default_step("gqa", {}) == Step("gqa", 1, 20, 5)
    assert default_step("vqa", settings, samples=8, text=None, gpu=False).samples == 8
    assert not default_step("vqa", settings, gpu=False).gpu
