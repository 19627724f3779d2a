"""TVQA, How2QA, TVC and YC2C as a LightningDataModule."""

from __future__ import annotations

from typing import Any, Literal

from data_modules.batches.dataset import Clips
from data_modules.benchmark import BenchmarkDataModule
from vlpet_lightning.checks import positive
from vlpet_lightning.tasks import VIDEO_TEXT


class VideoTextDataModule(BenchmarkDataModule):
    """Data module of the VALUE benchmark's video-text tasks, with its annotation files and feature stores.

    A training step draws one task, the same on every rank; ``batch_size`` is the global batch size over all ranks.
    Every sample is scored exactly once on any number of ranks. If the answers of a test split are not public, nothing
    is scored, and ``callbacks.PredictionWriter`` writes predictions in the format of the evaluation server.

    Args:
        root: Folder with ``video/ann`` (or this below ``annotations``) and ``features``.
        tokenizer: Folder or hub name of the backbone's tokenizer.
        tasks: Names of tasks.
        batch_size: Global batch size.
        eval_batch_size: Batch size per rank for evaluation.
        frames: Number of frames per clip; shorter clips are padded with zeros, longer ones max-pooled over time.
        mask_frames: Mask padding frames (the original attends to them).
        truncate: Truncation of inputs that exceed the task's limit: at the ``end``, which can remove the question, the
            choices and the prompt, or only in the ``subtitles``.
        caption_items: Evaluation items of the caption tasks: each ``description`` with itself as its only reference, or
            each ``clip`` once with all its descriptions.
        kwargs: See :class:`~data_modules.benchmark.BenchmarkDataModule`.

    Raises:
        ValueError: If a task is unknown, or a number is out of range.
    """

    choices = VIDEO_TEXT

    def __init__(
        self,
        root: str,
        tokenizer: str,
        tasks: list[str] = list(VIDEO_TEXT),  # noqa: B006  # shown by --help; never changed
        batch_size: int = 50,
        eval_batch_size: int = 50,
        frames: int = 64,
        mask_frames: bool = False,
        truncate: Literal["end", "subtitles"] = "end",
        caption_items: Literal["description", "clip"] = "description",
        **kwargs: Any,
    ) -> None:
        super().__init__(root, tokenizer, tasks, batch_size, eval_batch_size, **kwargs)
        self.clips = Clips(positive("frames", frames), mask_frames, short_subtitles=truncate == "subtitles")
        self.by_clip = caption_items == "clip"
