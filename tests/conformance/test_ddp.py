"""Two processes have the gradients of one; only methods with parts a task ask DDP to search for unused parameters."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback

from tests.conformance.bench import FEATURE_DIM, GRID, MODULES, make_batch
from tests.runs import Batches, quiet_trainer
from vlpet_lightning.pet import Adapter, PerTask, Placement

TASKS = ("vqa", "caption")
SITES = ["encoder.ffn", "decoder.cross"]
ADAPTER = partial(Adapter, rank=4)
METHODS = {
    "for-all-tasks": ("bart", ADAPTER, False),
    "per-task": ("t5", partial(PerTask, unit=ADAPTER, tasks=TASKS), True),
}


class Record(Callback):
    """Writes the gradients of every step, and what DDP was told."""

    def __init__(self, folder):
        self.folder = folder

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        told = getattr(trainer.strategy, "_ddp_kwargs", {}).get("find_unused_parameters", False)
        torch.save((gradients, told), self.folder / f"{trainer.global_rank}-{trainer.global_step}.pt")


def fit(kind, backbone, unit, folder, **changes):
    folder.mkdir()
    module = MODULES[kind](
        str(backbone),
        placements=[Placement(SITES, unit)],
        trainable=["pet", "visual_embedding"],
        feature_dim=FEATURE_DIM,
        grid=GRID,
        dropout=0.0,
    )
    # 5 samples over 2 ranks: a mean of the ranks' means would be wrong
    batches = [make_batch(kind, task, size=5, seed=seed) for seed, task in enumerate(TASKS * 2)]
    quiet_trainer(folder, callbacks=[Record(folder)], **changes).fit(module, Batches(batches))
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_have_the_gradients_of_one(tiny_backbone, tiny_t5, tmp_path, method):
    kind, unit, searches = METHODS[method]
    backbone = {"bart": tiny_backbone, "t5": tiny_t5}[kind]
    alone = fit(kind, backbone, unit, tmp_path / "alone")
    # forked: a spawned child imports lightning before our torchvision cure
    both = fit(kind, backbone, unit, tmp_path / "both", devices=2, strategy="ddp_fork")
    assert set(both) == {f"{rank}-{step}" for rank in (0, 1) for step in range(2 * len(TASKS))}
    for name, (gradients, told) in both.items():
        assert told == searches
        expected, _ = alone[f"0-{name[2:]}"]
        assert set(gradients) == set(expected)
        for key, gradient in expected.items():
            torch.testing.assert_close(gradients[key], gradient, rtol=1e-3, atol=1e-6)
    skipped = {frozenset(gradients) for gradients, _ in alone.values()}
    assert (len(skipped) > 1) == searches
