"""TVQA, How2QA, TVC and YC2C as a LightningDataModule."""

from __future__ import annotations

from typing import Any, Literal

from data_modules.batches.dataset import Clips
from data_modules.benchmark import BenchmarkDataModule
from vlpet_lightning.checks import positive
from vlpet_lightning.tasks import VIDEO_TEXT


class VideoTextDataModule(BenchmarkDataModule):
    """The video-text tasks of the VALUE benchmark, from its own annotation files and feature stores.

    A training step draws one task, the same on every rank; ``batch_size`` is that of all ranks together. Every sample
    is scored exactly once on any number of ranks. Where a test split has no answers (a server keeps them) there is
    nothing to score, and ``callbacks.PredictionWriter`` writes what the server takes.

    Args:
        root: Folder with ``video/ann`` (or this below ``annotations``) and ``features``.
        tokenizer: Folder or hub name of the backbone's tokenizer.
        tasks: Names of tasks.
        batch_size: Samples of a batch.
        eval_batch_size: The same for evaluation, on each rank.
        frames: Frames of a clip; shorter clips get zeros, longer ones are max-pooled over time.
        mask_frames: Hide these zeros from the model (the original attends to them).
        truncate: Where an input that is longer than the task allows is cut: at its ``end``, which can take the
            question, the choices and the prompt away, or in its ``subtitles`` alone.
        caption_items: What is evaluated: each ``description`` with itself as its only reference, or each ``clip`` once
            with all its descriptions.
        kwargs: See :class:`~data_modules.benchmark.BenchmarkDataModule`.

    Raises:
        ValueError: If a task is unknown, or a number makes no sense.
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
