"""LightningDataModules over the benchmark's own files, and the commands that make and convert data."""

import vlpet_lightning  # noqa: F401  # first: its cure must run before anything imports torchvision
from data_modules.image_text import ImageTextDataModule
from data_modules.store.store import FeatureStore
from data_modules.video_text import VideoTextDataModule

__all__ = ["FeatureStore", "ImageTextDataModule", "VideoTextDataModule"]
