"""VQA, GQA, NLVR2 and COCO captions as a LightningDataModule."""

from __future__ import annotations

from typing import Any

from data_modules.benchmark import BenchmarkDataModule
from vlpet_lightning.tasks import IMAGE_TEXT


class ImageTextDataModule(BenchmarkDataModule):
    """The image-text tasks of the benchmark, from its own annotation files and feature stores.

    A training step draws one task, the same on every rank; ``batch_size`` is that of all ranks together. Every sample
    is scored exactly once on any number of ranks.

    Args:
        root: Folder with ``vqa``, ``GQA``, ``nlvr``, ``COCO`` (or these below ``annotations``) and ``features``.
        tokenizer: Folder or hub name of the backbone's tokenizer.
        tasks: Names of tasks.
        batch_size: Samples of a VQA batch; the other tasks' follow from their ``batch_share``.
        eval_batch_size: The same for evaluation, on each rank.
        kwargs: See :class:`~data_modules.benchmark.BenchmarkDataModule`.

    Raises:
        ValueError: If a task is unknown, or a number makes no sense.
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
