"""Modules with weights as if trained, for tests of exported files."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch

from tests.runs import tiny_module
from vlpet_lightning import VLT5, VLModel
from vlpet_lightning.module import VLModule


def module_of(kind: str, backbone: Path, *, build: bool = True, **changes: Any) -> VLModule:
    """Build a module with a tiny backbone."""
    module: VLModule
    if kind == "bart":
        module = tiny_module(backbone, **changes)
    else:
        like = tiny_module(backbone)
        arguments = {"placements": like.placements, "trainable": like.rules, "feature_dim": like.feature_dim, "grid": 2}
        module = VLT5(str(backbone), **(arguments | changes))
    if build:
        module.configure_model()
    return module


def loud(model: VLModel) -> VLModel:
    """Draw large weights for all trained parameters; a tensor depends only on its name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model
