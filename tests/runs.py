"""Small runs for tests: a module with the tiny backbone, random batches, a quiet trainer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from tests.tiny import SPECIALS, WORDS
from vlpet_lightning import Batch, VLBart
from vlpet_lightning.pet import VLPET, LargeGate, ParallelAdapter, Placement

FEATURE_DIM = 16


def placements(rank: int = 8, gate: Any = None) -> list[Placement]:
    """Return the placements of VL-PET-large, or another gate, at the tiny size."""
    gate = gate or partial(LargeGate, rank=rank)
    return [
        Placement(["encoder.attn", "encoder.ffn"], partial(VLPET, rank=rank, heads=4, gate=gate)),
        Placement(["decoder.cross.value"], partial(ParallelAdapter, rank=rank)),
    ]


def tiny_module(backbone: Path, **changes: Any) -> VLBart:
    """Build a module with VL-PET-large on the tiny backbone."""
    arguments: dict[str, Any] = {
        "placements": placements(),
        "trainable": ["pet", "visual_embedding", "encoder.layer_norm"],
        "feature_dim": FEATURE_DIM,
        "grid": 2,
        "lr": 1e-2,
    }
    return VLBart(str(backbone), **(arguments | changes))


def make_batch(task: str, size: int, seed: int) -> Batch:
    """Build a batch of random words and features, whose last sample is shorter than the others."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(len(SPECIALS), len(SPECIALS) + len(WORDS), (size, 7), generator=generator)
    words[:, 0], words[:, -1] = 0, 2
    words[-1, 4:] = torch.tensor([2, 1, 1])
    labels = torch.randint(len(SPECIALS), len(SPECIALS) + len(WORDS), (size, 4), generator=generator)
    labels[:, 0], labels[:, -1] = 0, 2
    labels[-1, 2:] = torch.tensor([2, -100])
    images = (2,) if task == "nlvr2" else ()
    return Batch(
        task=task,
        input_ids=words,
        features=torch.randn(size, *images, 4, FEATURE_DIM, generator=generator),
        labels=labels,
        weights=torch.rand(size, generator=generator) if task == "vqa" else None,
        ids=[f"{task}-{seed}-{index}" for index in range(size)],
    )


def share(batch: Batch, rank: int, ranks: int) -> Batch:
    """Return a rank's rows of a batch."""

    def rows(value: Any) -> Any:
        return value[rank::ranks] if isinstance(value, Tensor | list) else value

    return replace(
        batch, **{name: rows(value) for name, value in vars(batch).items() if name not in ("task", "_targets")}
    )


def trained(module: VLBart) -> dict[str, Tensor]:
    """Return the trained parameters of a module by name."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


class Batches(LightningDataModule):
    """A fixed list of batches, distributed over the ranks."""

    def __init__(self, batches: list[Batch]) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        mine = [share(batch, self.trainer.global_rank, self.trainer.world_size) for batch in self.batches]
        return DataLoader(mine, batch_size=None)  # type: ignore[arg-type]


def quiet_trainer(root: Path, **changes: Any) -> Trainer:
    """Build a trainer on the CPU, without progress bar and model summary."""
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
        "default_root_dir": root,
    }
    return Trainer(**(arguments | changes))
