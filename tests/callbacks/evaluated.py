"""A module with fixed predictions, for tests of callbacks that process predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from vlpet_lightning.batch import Batch


class Fixed(LightningModule):
    """Predicts the text in ``answers`` for the id of each sample."""

    def __init__(self, answers: dict[str, str]) -> None:
        super().__init__()
        self.answers = answers
        self.scores: dict[str, dict[str, float]] = {}
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def validation_step(self, batch: Batch) -> dict[str, list[str]]:
        return {"predictions": [self.answers[id] for id in batch.ids]}

    test_step = predict_step = validation_step

    def training_step(self, batch: Batch) -> torch.Tensor:
        return self.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def batch(task: str, ids: list[str], references: list[Any]) -> Batch:
    count = len(ids)
    return Batch(
        task=task,
        input_ids=torch.zeros(count, 2, dtype=torch.long),
        features=torch.zeros(count, 1, 4),
        ids=ids,
        references=references,
        images=[(f"image{id}",) for id in ids],
        texts=[f"what is {id}?" for id in ids],
    )


def loader(batches: list[Batch]) -> DataLoader:
    return DataLoader(batches, batch_size=None)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(
        accelerator="cpu",
        devices=options.pop("devices", 1),
        logger=options.pop("logger", False),
        callbacks=list(callbacks),
        default_root_dir=folder,
        **quiet,
        **options,
    )


def vqa(*answers: str) -> dict[str, Any]:
    return {"answers": [*answers] * (10 // len(answers)), "label": {answers[0]: 1.0}}
