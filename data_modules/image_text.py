"""VQA, GQA, NLVR2 and COCO captions as a LightningDataModule."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_modules.benchmark import BenchmarkDataModule
from data_modules.extraction.image_files import ImageFiles, Reader
from data_modules.extraction.media import Images
from data_modules.store.rows import AnyStore
from vlpet_lightning.tasks import IMAGE_TEXT, TaskSpec

MOST_WORKERS = 8  # each holds two batches of pixels in shared memory
OF_FEATURES = ("features", "bank", "stream")  # settings that are about stored features


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
        images: Folder of image files to read instead of stored features, with a subfolder for each feature store, as in
            ``data extract images --each_folder true``; for models that run their own vision tower (``image_input`` of
            ``VLCausal``).
        exif_orientation: Whether to apply the EXIF orientation of these images.
        num_workers: Worker processes; null for none with stored features, which is fastest on a local disk, and for
            the cores of each rank, at most 8, with image files.
        kwargs: See :class:`~data_modules.benchmark.BenchmarkDataModule`.

    Raises:
        ValueError: If a task is unknown, a number is out of range, or ``images`` is combined with a setting of stored
            features.
    """

    choices = IMAGE_TEXT

    def __init__(
        self,
        root: str,
        tokenizer: str,
        tasks: list[str] = list(IMAGE_TEXT),  # noqa: B006  # shown by --help; never changed
        batch_size: int = 500,
        eval_batch_size: int = 500,
        *,
        images: str | None = None,
        exif_orientation: bool = True,
        num_workers: int | None = None,
        **kwargs: Any,
    ) -> None:
        for name in OF_FEATURES if images is not None else ():
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"images is {images} and {name} is {kwargs[name]}: {name} is about stored features, which are not "
                    "read beside image files; remove one of the two"
                )
        super().__init__(root, tokenizer, tasks, batch_size, eval_batch_size, num_workers=num_workers or 0, **kwargs)
        self.images = None if images is None else Path(images)
        self.exif_orientation = exif_orientation
        self._files: dict[str, ImageFiles] = {}  # by folder
        self._reader: Reader | None = None
        self._counts_workers = num_workers is None and images is not None

    def prepare_data(self) -> None:
        """Check that the files of the stage exist, and that the model reads what is there, before loggers start a run.

        Raises:
            FileNotFoundError: If an annotation file, or a folder of image files, is missing.
            FeatureStoreError: If a feature store is missing, or one of its files is missing or truncated.
            ValueError: If the model reads features and this data module image files, or the other way round.
        """
        check = getattr(None if self.trainer is None else self.trainer.lightning_module, "check_images", None)
        if check is not None:
            check(self)
        super().prepare_data()

    def store(self, spec: TaskSpec, split: str) -> AnyStore:
        """Open the feature store, or the folder of image files, of a task's split.

        Raises:
            FeatureStoreError: If there is no complete store.
            FileNotFoundError: If there is no folder of image files.
            UnusableFiles: If two image files have the same id.
            ValueError: If the features do not have the width that the model expects.
        """
        if self.images is None:
            return super().store(spec, split)
        name = spec.splits[split].features
        if name not in self._files:
            self._files[name] = ImageFiles(self.images / name, self.exif_orientation)
            self._files[name].reader = self._reader
        return self._files[name]

    def feature_stores(self) -> dict[str, tuple[Mapping[str, Any], Path | None]]:
        """As in the base class; of image files, how they are read, without looking for them."""
        if self.images is None or self._reader is None:
            return super().feature_stores()
        tokens, dim = self._reader.shape
        extractor = {**self._reader.record(), **Images(self.exif_orientation).record}
        return {name: ({"tokens": tokens, "dim": dim, "extractor": extractor}, None) for name in self.tasks}

    def workers(self) -> int:
        if not self._counts_workers:
            return self.num_workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = min(MOST_WORKERS, cores // (1 if self.trainer is None else self.trainer.num_devices))
        return share if share > 1 else 0

    def read_images_with(self, reader: Reader) -> None:
        """Set the conversion of images to pixels, see :meth:`vlpet_lightning.VLCausal.pixel_reader`."""
        self._reader = reader
        for files in self._files.values():
            files.reader = reader
