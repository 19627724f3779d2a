"""LightningDataModules for the benchmark's files, and the commands that create and convert data."""

import vlpet_lightning  # noqa: F401  # first: its workaround must run before torchvision is imported
from data_modules.image_text import ImageTextDataModule
from data_modules.store.store import FeatureStore
from data_modules.video_text import VideoTextDataModule

__all__ = ["FeatureStore", "ImageTextDataModule", "VideoTextDataModule"]
