"""From a plan of rows to a batch: tokens, features and answers, gathered for the whole batch in the main process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data_modules.annotations.columns import CodedTuples, coded, values_at
from data_modules.annotations.records import Samples
from data_modules.batches.answers import AnswerDraw
from data_modules.batches.length_buckets import longest, sort_key
from data_modules.batches.prompts import distinct_inputs, short_subtitles, source_of
from data_modules.batches.sampling import Plan
from data_modules.batches.token_cache import TokenizerKey
from data_modules.batches.tokens import TokenTable
from data_modules.store.array_cache import ArrayCache
from data_modules.store.bank import Pending
from data_modules.store.frames import CLIP_IMAGES, fit_frames, lengths_of
from data_modules.store.rows import AnyStore
from vlpet_lightning.batch import IGNORED, Batch
from vlpet_lightning.tasks import TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Clips:
    """Preprocessing of the frames and subtitles of clips.

    Args:
        frames: Number of frames per clip: shorter clips are padded with zeros, longer ones max-pooled over time.
        mask_frames: Whether padding frames are masked.
        short_subtitles: Whether an input that is too long is truncated in its subtitles instead of at its end.
    """

    frames: int
    mask_frames: bool = False
    short_subtitles: bool = False


class TaskData:
    """One task's samples of one split, tokenised and ready for batching.

    Args:
        task: The task.
        samples: Its samples.
        store: The features of their images, or their image files.
        tokenizer: The backbone's tokenizer.
        prompt: The task's prompt, part of every input.
        draw: Draw of the training answers; None for evaluation, whose batches have references instead of labels.
        shuffle_seed: If not None, every image gets the features of another one: the blind control.
        clips: Preprocessing of clips, for video tasks, whose features are frames.
        cache: Cache of token tables.
        tokenizer_key: Key of the tokenizer in the cache, if several tasks share it.
        banked: Whether training batches have no features because a bank adds them later.

    Raises:
        MissingFeatures: If images have no features; the message gives their number and some ids.
    """

    def __init__(
        self,
        task: TaskSpec,
        samples: Samples,
        store: AnyStore,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt: str,
        draw: AnswerDraw | None = None,
        shuffle_seed: int | None = None,
        clips: Clips | None = None,
        cache: ArrayCache | None = None,
        tokenizer_key: TokenizerKey | None = None,
        banked: bool = False,
    ) -> None:
        self.images = image_rows(samples, store, shuffle_seed)  # first, because it is fast and can fail
        self.task = task
        self.samples = samples
        self.store = store
        self.draw = draw
        self.clips = clips
        self.banked = banked
        extractor = {} if clips is None else store.meta.get("extractor") or {}
        self.clip_images: int | None = extractor.get(CLIP_IMAGES)  # of a clip that is several images
        self.pad = int(tokenizer.pad_token_id)
        title = f"tokenising {task.name}"
        short = clips is not None and clips.short_subtitles
        texts = (
            partial(short_subtitles, task, samples, prompt, tokenizer)
            if short
            else partial(distinct_inputs, task, samples, prompt)
        )
        source = source_of(task, samples, prompt, short)
        cached: dict[str, Any] = {"cache": cache, "tokenizer_key": tokenizer_key}
        self.texts = TokenTable(texts, tokenizer, task.max_text, title, source=source, **cached)
        # the last entry is the empty target of samples without an answer, which have weight 0
        answers = coded(samples.answers).extended("")
        self.targets = None if draw is None else TokenTable(answers, tokenizer, task.max_target, title, **cached)

    def __len__(self) -> int:
        return len(self.samples)

    def sort_key(self) -> np.ndarray:
        """Return the ``(n,)`` int64 sort key of all samples by input length, then by their longest answer's length."""
        texts = self.texts.lengths
        if self.targets is None:
            return texts
        return sort_key(texts, longest(self.targets.lengths, self.samples.offsets))

    def batch(self, plan: Plan) -> Batch | Pending:
        """Gather the planned samples as a batch, without features if a bank holds them."""
        rows = plan.rows
        input_ids, mask = self.texts.padded(rows, self.pad)
        labels, weights = self._labels(plan)
        samples = self.samples
        batch = Batch(
            task=self.task.name,
            input_ids=torch.from_numpy(input_ids),
            features=torch.empty(0),
            text_mask=torch.from_numpy(mask),
            labels=labels,
            weights=weights,
            ids=values_at(samples.ids, rows),
            references=[samples.references[row] for row in rows] if samples.references else [],
            images=values_at(samples.images, rows),
            texts=values_at(samples.texts, rows),
            store=str(self.store.where),
            rows=[tuple(images) for images in self.images[rows].tolist()],
        )
        if self.banked:
            return Pending(batch, [self.images[share].reshape(-1) for share in plan.shares], plan.rank)
        images = self.images[rows].reshape(-1)
        self.store.expect(plan.ahead)
        return self.with_features(batch, torch.as_tensor(self.store.gather(images)), images)

    def with_features(self, batch: Batch, features: Tensor, images: np.ndarray) -> Batch:
        """Add features to a batch.

        Args:
            batch: ``B`` samples.
            features: ``(B * N, tokens, dim)`` as gathered from the store; those of all images of a clip, one after the
                other, are divided.
            images: Their ``(B * N,)`` store rows.
        """
        if self.task.images > 1:
            features = features.reshape(len(batch), self.task.images, *features.shape[1:])
        if self.clip_images is not None:
            features = features.unflatten(1, (self.clip_images, -1))
        if self.clips is None or self.clip_images is not None:
            return replace(batch, features=features)
        known = self.store.lengths(images)
        lengths = lengths_of(features) if known is None else torch.as_tensor(known, dtype=torch.int64)
        features, mask = fit_frames(features, lengths.to(features.device), self.clips.frames)
        return replace(batch, features=features, feature_mask=mask if self.clips.mask_frames else None)

    def _labels(self, plan: Plan) -> tuple[Tensor | None, Tensor | None]:
        if self.draw is None or self.targets is None:
            return None, None
        answers, scores = self.draw(plan.rows, plan.epoch)
        labels, _ = self.targets.padded(answers, IGNORED)  # -1 selects the last entry
        weights = scores if self.task.loss == "weighted_sample" else np.ones_like(scores)
        weights = np.where(answers < 0, 0, weights)
        if plan.filler:  # samples without labels do not count in the loss
            labels, weights = np.full_like(labels, IGNORED), np.zeros_like(weights)
        return torch.from_numpy(labels), torch.from_numpy(weights)


class TaskDataset(Dataset):
    """All tasks of one split; each item is a whole batch.

    Gathering a whole batch from the memory map is several times faster than collating samples from worker processes.
    Use it as ``DataLoader(dataset, sampler=sampler, batch_size=None)``.

    Args:
        tasks: The data of each task, by name.
    """

    def __init__(self, tasks: Mapping[str, TaskData]) -> None:
        self.tasks = dict(tasks)

    def __len__(self) -> int:
        return sum(map(len, self.tasks.values()))

    def __getitem__(self, plan: Plan) -> Batch | Pending:
        return self.tasks[plan.task].batch(plan)


def image_rows(samples: Samples, store: AnyStore, shuffle_seed: int | None = None) -> np.ndarray:
    """Look up the store rows of every sample's images.

    Args:
        samples: ``n`` samples of ``N`` images.
        store: The store.
        shuffle_seed: If not None, rows are replaced by those of other images, by a derangement of the store.

    Returns:
        ``(n, N)`` int64 rows of the store.

    Raises:
        MissingFeatures: If an image has no features.
        ValueError: If the store is too small to shuffle.
    """
    images = samples.images if isinstance(samples.images, CodedTuples) else CodedTuples.of(samples.images)
    rows = store.rows(list(images.values))
    if shuffle_seed is not None:
        rows = derangement(len(store), shuffle_seed)[rows]
    return rows[images.codes]


def derangement(size: int, seed: int) -> np.ndarray:
    """Return a random permutation of ``range(size)`` without fixed points (a single cycle).

    Raises:
        ValueError: If ``size`` is less than 2.
    """
    if size < 2:
        raise ValueError(f"cannot shuffle features between images: the store has {size}")
    cycle = np.random.default_rng(seed).permutation(size)
    moved = np.empty(size, dtype=np.int64)
    moved[cycle] = np.roll(cycle, 1)
    return moved
