"""Parameter-efficient tuning of vision-and-language models: VL-PET and related methods on PyTorch Lightning."""

from vlpet_lightning import torchvision_compat  # isort: skip  # must run before anything imports torchvision
from vlpet_lightning.version import __version__

_LAZY = {
    "Batch": "vlpet_lightning.batch",
    "Predictor": "vlpet_lightning.predictor",
    "VLBart": "vlpet_lightning.module",
    "VLCausal": "vlpet_lightning.causal_module",
    "VLMBart": "vlpet_lightning.module",
    "VLT5": "vlpet_lightning.module",
    "VLModel": "vlpet_lightning.model",
    "VLModule": "vlpet_lightning.module",
    "build": "vlpet_lightning.api",
    "count_parameters": "vlpet_lightning.parameters",
    "from_config": "vlpet_lightning.api",
    "load_pet": "vlpet_lightning.interop.export.pet_files",
    "load_run": "vlpet_lightning.api",
    "make_batch": "vlpet_lightning.api",
    "merge_units": "vlpet_lightning.interop.export.merge",
    "placement_report": "vlpet_lightning.parameters",
    "random_backbone": "vlpet_lightning.backbones.small",
    "save_pet": "vlpet_lightning.interop.export.pet_files",
}


def __getattr__(name: str) -> object:
    # `--help` of a verb should not wait for lightning and transformers
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "VLT5",
    "Batch",
    "Predictor",
    "VLBart",
    "VLCausal",
    "VLMBart",
    "VLModel",
    "VLModule",
    "__version__",
    "build",
    "count_parameters",
    "from_config",
    "load_pet",
    "load_run",
    "make_batch",
    "merge_units",
    "placement_report",
    "random_backbone",
    "save_pet",
    "torchvision_compat",
]
