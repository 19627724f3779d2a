"""Base class of both data modules: samples, stores, samplers and loaders of the benchmark's tasks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from data_modules.annotations.image_text import VQA_ANSWER_FILES, files_of, find_file, read_split
from data_modules.annotations.records import Samples
from data_modules.annotations.server_questions import check_question_tasks, read_questions
from data_modules.annotations.splits import check_before_run
from data_modules.batches.answers import AnswerDraw
from data_modules.batches.banks import fill_banks
from data_modules.batches.dataset import Clips, TaskData, TaskDataset
from data_modules.batches.length_buckets import LengthBuckets
from data_modules.batches.loader import ResumingLoader, check_same_epoch
from data_modules.batches.sampling import EvalSampler, PlanSampler, TaskMixSampler
from data_modules.batches.token_cache import TokenizerKey
from data_modules.provenance import provenance_of
from data_modules.store.array_cache import ArrayCache
from data_modules.store.bank import FeatureBank, Pending
from data_modules.store.cache_home import cache_home
from data_modules.store.rows import AnyStore
from data_modules.streaming.order import ShardOrder, Window, order_of, windows
from data_modules.streaming.places import Places
from data_modules.streaming.streamed_store import Stream
from vlpet_lightning.backbones import load_tokenizer
from vlpet_lightning.batch import Batch
from vlpet_lightning.checks import positive, within
from vlpet_lightning.run.signals import end_workers_at_exit, leave_it_to_the_run
from vlpet_lightning.tasks import TaskSpec
from vlpet_lightning.tasks import task as task_named

SEED = 42  # in runs without seed_everything
STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}


class BenchmarkDataModule(LightningDataModule):
    """Base class for data modules over some of the benchmark's tasks, with its annotation files and feature stores.

    A training step draws one task, the same on every rank; ``batch_size`` is the global batch size over all ranks.
    Every sample is scored exactly once on any number of ranks.

    Args:
        root: Folder or URL with the annotation files and ``features``.
        tokenizer: Folder or hub name of the backbone's tokenizer.
        tasks: Names of tasks.
        batch_size: Global batch size, multiplied by each task's ``batch_share``.
        eval_batch_size: Batch size per rank for evaluation, multiplied by each task's ``batch_share``.
        batch_sizes: Global training batch sizes of single tasks, overriding their share.
        prompts: Prompts of single tasks, overriding the original's.
        seed: Seed of the order of samples and of drawn answers; null for the run's (``seed_everything``). A resumed run
            keeps that of its checkpoint.
        seeded_order: Whether the order of samples and tasks depends on the seed (the original's does not).
        answer_draw: ``original``: a question has the same answer in every epoch; ``seeded``: drawn anew in each epoch.
        length_buckets: Number of batches whose samples are sorted by length together, so that samples of similar length
            share a batch and less of it is padding; 0 disables. It requires ``seeded_order: true``, because it changes
            the order of samples.
        eval_by_length: Evaluate from the longest input to the shortest instead of in file order. Padding, and with it
            the last digits of an output, then differ.
        shuffle_features: Give every image the features of another one, as a blind control.
        feature_dim: Width of features that the model expects; None accepts any width.
        limit_train: Train only on the first samples of each task.
        limit_eval: Evaluate only on the first samples of each task.
        predict_questions: By task, a question file of an evaluation server (docs/evaluation.md), to which ``predict``
            answers instead of the test split; its images need features in the test split's store.
        num_workers: Worker processes; 0 is fastest if the features are on a local disk.
        token_cache: Cache the annotations and tokens of large splits below ``$XDG_CACHE_HOME/vlpet_lightning``
            (``~/.cache``), so that later starts do not decode and tokenise them again.
        bank: Hold the features of training images in memory, sharded over the ranks: ``device`` on each rank's device,
            where batches are gathered; ``ram`` in the machine's memory.
        features: Folder or URL with the feature stores, or in the published layout; by default ``features`` below the
            root.
        stream: Fetch feature shards on demand into a bounded local cache (docs/data.md); for features at a URL, this
            is on by default.

    Raises:
        ValueError: If a task is unknown, a number is out of range, or ``length_buckets`` is combined with the
            original's order.
    """

    choices: ClassVar[tuple[str, ...]]  # names of the supported tasks

    def __init__(
        self,
        root: str,
        tokenizer: str,
        tasks: list[str],
        batch_size: int,
        eval_batch_size: int,
        *,
        batch_sizes: dict[str, int] | None = None,
        prompts: dict[str, str] | None = None,
        seed: int | None = None,
        seeded_order: bool = False,
        answer_draw: Literal["original", "seeded"] = "original",
        length_buckets: int = 0,
        eval_by_length: bool = False,
        shuffle_features: bool = False,
        feature_dim: int | None = None,
        limit_train: int | None = None,
        limit_eval: int | None = None,
        predict_questions: dict[str, str] | None = None,
        num_workers: int = 0,
        token_cache: bool = True,
        bank: Literal["device", "ram"] | None = None,
        features: str | None = None,
        stream: Stream | None = None,
    ) -> None:
        super().__init__()
        self.places = Places(root, features, stream)
        self.root = self.places.root  # for a URL, the folder of the local copies
        self.tokenizer = tokenizer
        self.tasks = self._task_table(tasks)
        self.batch_size = positive("batch_size", batch_size)
        self.eval_batch_size = positive("eval_batch_size", eval_batch_size)
        self.batch_sizes = {name: positive(f"batch_sizes.{name}", n) for name, n in (batch_sizes or {}).items()}
        self.prompts = dict(prompts or {})
        for name in (*self.batch_sizes, *self.prompts):
            task_named(name)  # rejects misspelt names; entries of unused tasks are fine, as protocols set them
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", SEED)) if seed is None else seed
        # of checkpoints without a seed: then, the run's seed had no effect here
        self._unrecorded_seed = SEED if seed is None else seed
        self.seeded_order = seeded_order
        self.answer_draw = answer_draw
        self.length_buckets = int(within("length_buckets", length_buckets, 0))
        if length_buckets and not seeded_order:
            raise ValueError(
                f"length_buckets: {length_buckets} changes the order of samples, and seeded_order: false keeps the "
                "original's: set seeded_order: true (part of the protocol `corrected`) or length_buckets: 0"
            )
        self.eval_by_length = eval_by_length
        self.shuffle_features = shuffle_features
        self.feature_dim = feature_dim
        self.limit_train = None if limit_train is None else positive("limit_train", limit_train)
        self.limit_eval = None if limit_eval is None else positive("limit_eval", limit_eval)
        self.predict_questions = dict(predict_questions or {})
        check_question_tasks(self.predict_questions)
        self.num_workers = int(within("num_workers", num_workers, 0))
        self.token_cache = ArrayCache(cache_home() / "tokens") if token_cache else None
        self.annotation_cache = ArrayCache(cache_home() / "annotations") if token_cache else None
        self.bank = bank
        self.banks: dict[str, FeatureBank] = {}  # by task; tasks on the same store share one
        self.allow_zero_length_dataloader_with_multiple_devices = True  # with more ranks than samples, some have none
        self.datasets: dict[str, TaskDataset] = {}
        self.orders: dict[str, dict[str, ShardOrder]] = {}  # by split; tasks with streamed features only
        self.buckets: dict[str, LengthBuckets] = {}  # by training task; empty if length_buckets is 0
        self.clips: Clips | None = None  # video tasks only
        self.by_clip = False

    def prepare_data(self) -> None:
        """Check that the files of the stage exist, before loggers start a run.

        Raises:
            FileNotFoundError: If an annotation file is missing.
            FeatureStoreError: If a feature store is missing, or one of its files is missing or truncated.
        """
        running = None if self.trainer is None else self.trainer.state.fn
        stage = "fit" if running is None else running.value
        parts = [(spec, split) for split in STAGES[stage] for spec in self.tasks.values()]
        for spec, split in parts:
            if stage == "predict" and spec.name in self.predict_questions:
                read_questions(spec.name, self.predict_questions[spec.name])
                continue
            self.places.fetch(files_of(spec, split), optional=VQA_ANSWER_FILES)
            for name in set(files_of(spec, split)) - set(VQA_ANSWER_FILES):
                find_file(self.root, name)
        for part in parts:
            self.store(*part).check_sizes()

    def setup(self, stage: str) -> None:
        """Load the data of the stage.

        Raises:
            FileNotFoundError: If an annotation file, a feature store or the tokenizer is missing.
            AnnotationError: If an annotation file cannot be used.
            MissingFeatures: If an image has no features.
            ValueError: If the features do not have the width that the model expects, or the trainer would replace the
                samplers.
        """
        if getattr(self.trainer, "overfit_batches", 0):
            raise ValueError("trainer.overfit_batches would replace the task sampler: use data.limit_train instead")
        if stage == "predict" and self.predict_questions:
            self.datasets.pop("test", None)  # of an earlier `test`
        splits = [split for split in STAGES[stage] if split not in self.datasets]
        if not splits:
            return
        # all checks come before the slow part; annotations first, because new users most often lack them
        samples = {(name, split): self.read(spec, split) for split in splits for name, spec in self.tasks.items()}
        if stage == "predict":
            asked = {name: path for name, path in self.predict_questions.items() if name in self.tasks}
            samples |= {(name, "test"): read_questions(name, path) for name, path in asked.items()}
        stores = {(name, split): self.store(self.tasks[name], split) for name, split in samples}
        check_before_run(samples)
        mixed = {split: self._windows(split, stores) for split in splits}
        tokenizer = load_tokenizer(self.tokenizer)
        tokenizer_key = None if self.token_cache is None else TokenizerKey(tokenizer)
        for split in splits:
            self.datasets[split] = TaskDataset(
                {
                    name: TaskData(
                        spec,
                        samples[name, split],
                        stores[name, split],
                        tokenizer,
                        prompt=self.prompts.get(name, spec.prompt),
                        draw=self._draw(samples[name, split]) if split == "train" else None,
                        shuffle_seed=self.seed if self.shuffle_features else None,
                        clips=self.clips,
                        cache=self.token_cache,
                        tokenizer_key=tokenizer_key,
                        banked=self.bank is not None and split == "train",
                    )
                    for name, spec in self.tasks.items()
                }
            )
            tasks = self.datasets[split].tasks
            self.orders[split] = {n: order_of(tasks[n].store, tasks[n].images, w) for n, w in mixed[split].items()}
        if "train" in splits and self.length_buckets:
            tasks = self.datasets["train"].tasks
            self.buckets = {n: LengthBuckets(data.sort_key(), self.length_buckets) for n, data in tasks.items()}
        if self.bank is not None and "train" in splits:
            self._fill_banks()

    def _windows(self, split: str, stores: dict[tuple[str, str], AnyStore]) -> dict[str, Window]:
        if self.bank is not None and split == "train":
            return {}  # no reads during training
        images = {name: spec.images for name, spec in self.tasks.items()}
        return windows({name: stores[name, split] for name in self.tasks}, images, together=split == "train")

    def _fill_banks(self) -> None:
        device, neighbours = torch.device("cpu"), 1
        if self.trainer is not None:
            neighbours = self.trainer.num_devices
            device = self.trainer.strategy.root_device if self.bank == "device" else device
        self.banks = fill_banks(self.datasets["train"].tasks, device=device, neighbours=neighbours, **self._ranks())

    def on_after_batch_transfer(self, batch: Batch | Pending, dataloader_idx: int) -> Batch:
        """Add the features from the bank, on the device."""
        if isinstance(batch, Batch):
            return batch
        task = batch.batch.task
        features = self.banks[task].gather(batch.rows).to(batch.batch.input_ids.device)
        return self.datasets["train"].tasks[task].with_features(batch.batch, features, batch.rows[batch.rank])

    def train_dataloader(self) -> ResumingLoader:
        """Return the loader of mixed-task training batches; it can resume in mid-epoch."""
        return ResumingLoader(self.datasets["train"], self._sampler(), self._batches_done, **self._loading())

    def val_dataloader(self) -> DataLoader:
        """Return the loader of the validation samples, task by task."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader:
        """Return the loader of the test samples, task by task."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Return the loader of the test samples."""
        return self._eval_loader("test")

    def state_dict(self) -> dict[str, Any]:
        """Return the settings that must not change when a run resumes in mid-epoch."""
        if "train" not in self.datasets:
            return {"batches_per_epoch": None}
        return {
            "seed": self.seed,
            "batches_per_epoch": len(self._sampler()),
            "windows": self._train_windows,
            "buckets": {name: buckets.fingerprint for name, buckets in self.buckets.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the checkpoint's seed, and check that an epoch has the same batches as when it was written.

        Raises:
            ValueError: If the number or the order of batches differs, so that a position would refer to other samples.
        """
        if "train" in self.datasets:
            self._reseed(state.get("seed", self._unrecorded_seed))
            buckets = {name: found.fingerprint for name, found in self.buckets.items()}
            check_same_epoch(state, len(self._sampler()), self._train_windows, buckets)

    def _reseed(self, seed: int) -> None:
        self.seed = seed
        for data in self.datasets["train"].tasks.values():
            if data.draw is not None:
                data.draw.seed = seed

    @property
    def _train_windows(self) -> dict[str, list[int]]:
        return {name: [order.window, order.count] for name, order in self.orders["train"].items()}

    def _task_table(self, names: list[str]) -> dict[str, TaskSpec]:
        if not names or len(set(names)) != len(names):
            raise ValueError(f"tasks must be one or more different names of {', '.join(self.choices)}, got {names}")
        for name in names:
            if name not in self.choices:
                raise ValueError(f"unknown task {name!r}: choose from {', '.join(sorted(self.choices))}")
        return {name: task_named(name) for name in names}

    def _sampler(self) -> TaskMixSampler:
        return TaskMixSampler(
            {name: len(data) for name, data in self.datasets["train"].tasks.items()},
            self.sizes_of_batches,
            seed=self.seed,
            seeded_order=self.seeded_order,
            orders=self.orders["train"],
            buckets=self.buckets,
            **self._ranks(),
        )

    @property
    def sizes_of_batches(self) -> dict[str, int]:
        """Global training batch size of each task."""
        return {name: self.batch_sizes.get(name, spec.batch_size(self.batch_size)) for name, spec in self.tasks.items()}

    def _eval_loader(self, split: str) -> DataLoader:
        dataset = self.datasets[split]
        sampler: PlanSampler = EvalSampler(
            {name: len(data) for name, data in dataset.tasks.items()},
            {name: spec.batch_size(self.eval_batch_size) for name, spec in self.tasks.items()},
            orders=self.orders[split],
            lengths={name: data.texts.lengths for name, data in dataset.tasks.items()} if self.eval_by_length else None,
            **self._ranks(),
        )
        return DataLoader(dataset, sampler=sampler, **self._loading())

    def workers(self) -> int:
        """Return the number of worker processes of a loader."""
        return self.num_workers

    def _loading(self) -> dict[str, Any]:
        end_workers_at_exit()
        return {
            "batch_size": None,
            "num_workers": self.workers(),
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": leave_it_to_the_run,
        }

    def _ranks(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _batches_done(self) -> int:
        if self.trainer is None or not self.trainer.training:
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def feature_stores(self) -> dict[str, tuple[Mapping[str, Any], Path | None]]:
        """Return the ``meta.json`` of each task's test features, and the folder of the store if it is local.

        Raises:
            FeatureStoreError: If there is no complete store.
        """
        stores = {name: self.store(spec, "test") for name, spec in self.tasks.items()}
        places = {name: store.where for name, store in stores.items()}
        return {n: (store.meta, p if isinstance(p := places[n], Path) else None) for n, store in stores.items()}

    def read(self, spec: TaskSpec, split: str) -> Samples:
        """Read the samples of a task's split, up to the configured limit.

        Raises:
            FileNotFoundError: If an annotation file is missing.
            AnnotationError: If an annotation file cannot be used.
        """
        self.places.fetch(files_of(spec, split), optional=VQA_ANSWER_FILES)
        limit = self.limit_train if split == "train" else self.limit_eval
        return read_split(self.root, spec, split, limit, by_clip=self.by_clip, cache=self.annotation_cache)

    def store(self, spec: TaskSpec, split: str) -> AnyStore:
        """Open the feature store of a task's split.

        Raises:
            FeatureStoreError: If there is no complete store.
            ValueError: If its features do not have the width that the model expects.
        """
        store = self.places.store(spec.splits[split].features)
        if self.feature_dim is not None and store.dim != self.feature_dim:
            raise ValueError(
                f"the features of {store.where} are {store.dim} wide, the model expects {self.feature_dim}: set the "
                f"model's feature_dim to {store.dim}, or extract features with the encoder that it was made for"
            )
        return store

    def provenance(self, stage: str) -> dict[str, Any]:
        """Describe the data that a stage's numbers depend on, for the protocol record of the run.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``, after :meth:`setup`.

        Returns:
            ``tasks``; ``items``, the switches between protocols; ``training`` and ``inputs``, all else that training or
            every stage depends on; and ``splits``, with each task's annotations, checksums, samples and feature store.
        """
        splits = {split: self.datasets[split].tasks for split in STAGES[stage]}
        questions = self.predict_questions if stage == "predict" else {}
        return {
            "tasks": list(self.tasks),
            "items": self.protocol_items(),
            "training": {
                "batch_sizes": self.sizes_of_batches,
                "data_seed": self.seed,
                "length_buckets": self.length_buckets,
                "limit_train": self.limit_train,
            },
            "inputs": {
                "shuffle_features": self.shuffle_features,
                "eval_by_length": self.eval_by_length,
                "frames": self._frames(splits),
            },
            "splits": {
                split: provenance_of(self.root, self.tasks, split, data, self._part(split), questions)
                for split, data in splits.items()
            },
        }

    def images_per_sample(self, spec: TaskSpec) -> int:
        """Return the number of images of a task's samples, after :meth:`setup`; a clip may be several."""
        data = next(iter(self.datasets.values())).tasks[spec.name]
        return data.clip_images or spec.images

    def _frames(self, splits: Mapping[str, Mapping[str, TaskData]]) -> int | None:
        """Return the number of frames of a clip."""
        if self.clips is None:
            return None
        spaced = [data.clip_images for tasks in splits.values() for data in tasks.values()]
        return next((frames for frames in spaced if frames is not None), self.clips.frames)

    def _pads_clips(self) -> bool:
        tasks = [data for dataset in self.datasets.values() for data in dataset.tasks.values()]
        return self.clips is not None and not (tasks and all(data.clip_images for data in tasks))

    def protocol_items(self) -> dict[str, Any]:
        """Return the values of the data module's switches between protocols; None for those without effect here."""
        draws = {"vqa", "gqa"} & self.tasks.keys()
        clips = self.clips
        captions = {"tvc", "yc2c"} & self.tasks.keys()
        return {
            "prompts": {name: self.prompts.get(name, spec.prompt) for name, spec in self.tasks.items()},
            "seeded_order": self.seeded_order,
            "answer_draw": self.answer_draw if draws else None,
            "mask_frames": clips.mask_frames if clips is not None and self._pads_clips() else None,
            "truncate": None if clips is None else "subtitles" if clips.short_subtitles else "end",
            "caption_items": None if not captions else "clip" if self.by_clip else "description",
        }

    def _part(self, split: str) -> str:
        limit = self.limit_train if split == "train" else self.limit_eval
        return "whole" if limit is None else f"first {limit} samples"

    def _draw(self, samples: Samples) -> AnswerDraw:
        by_epoch = self.answer_draw == "seeded"
        return AnswerDraw(samples.ids, samples.scores, samples.offsets, seed=self.seed, by_epoch=by_epoch)
