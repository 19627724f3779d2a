"""LightningDataModules for the benchmark's own files, and the commands that create and convert data."""

import vlpet_lightning  # noqa: F401  # first: its torchvision hook must be in place before anything imports torchvision

_LAZY = {
    "FeatureStore": "data_modules.store.store",
    "ImageTextDataModule": "data_modules.image_text",
    "VideoTextDataModule": "data_modules.video_text",
}


def __getattr__(name: str) -> object:
    # commands that need no model do not wait for torch and lightning
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["FeatureStore", "ImageTextDataModule", "VideoTextDataModule"]
