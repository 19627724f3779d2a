"""VQA, GQA, NLVR2 and COCO captions as a LightningDataModule."""

from __future__ import annotations

from typing import Any

from data_modules.benchmark import BenchmarkDataModule
from vlpet_lightning.tasks import IMAGE_TEXT


class ImageTextDataModule(BenchmarkDataModule):
    """Data module of the benchmark's image-text tasks, with its annotation files and feature stores.

    A training step draws one task, the same on every rank; ``batch_size`` is the global batch size over all ranks.
    Every sample is scored exactly once on any number of ranks.

    Args:
        root: Folder with ``vqa``, ``GQA``, ``nlvr``, ``COCO`` (or these below ``annotations``) and ``features``.
        tokenizer: Folder or hub name of the backbone's tokenizer.
        tasks: Names of tasks.
        batch_size: Global batch size for VQA; those of the other tasks follow from their ``batch_share``.
        eval_batch_size: Batch size per rank for evaluation, likewise.
        kwargs: See :class:`~data_modules.benchmark.BenchmarkDataModule`.

    Raises:
        ValueError: If a task is unknown, or a number is out of range.
    """

    choices = IMAGE_TEXT

    def __init__(
        self,
        root: str,
        tokenizer: str,
        tasks: list[str] = list(IMAGE_TEXT),  # noqa: B006  # shown by --help; never changed
        batch_size: int = 500,
        eval_batch_size: int = 500,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, tokenizer, tasks, batch_size, eval_batch_size, **kwargs)
