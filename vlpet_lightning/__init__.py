"""Parameter-efficient tuning of vision-and-language models: VL-PET and related methods on PyTorch Lightning."""

from vlpet_lightning import torchvision_compat  # isort: skip  # must run before anything imports torchvision
from vlpet_lightning.version import __version__

_LAZY = {
    "Batch": "vlpet_lightning.batch",
    "Predictor": "vlpet_lightning.predictor",
    "VLBart": "vlpet_lightning.module",
    "VLT5": "vlpet_lightning.module",
    "VLModel": "vlpet_lightning.model",
    "VLModule": "vlpet_lightning.module",
    "load_pet": "vlpet_lightning.interop.export.pet_files",
    "merge_units": "vlpet_lightning.interop.export.merge",
    "save_pet": "vlpet_lightning.interop.export.pet_files",
}


def __getattr__(name: str) -> object:
    # `--help` of a verb should not wait for lightning and transformers
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "VLT5",
    "Batch",
    "Predictor",
    "VLBart",
    "VLModel",
    "VLModule",
    "__version__",
    "load_pet",
    "merge_units",
    "save_pet",
    "torchvision_compat",
]
