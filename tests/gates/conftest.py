"""Fixtures of the tests of gates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import FEATURE_DIM
from vlpet_lightning import VLT5, VLBart, VLModel
from vlpet_lightning.pet import Placement


@pytest.fixture
def models(tiny_backbone: Path, tiny_t5: Path) -> Callable[..., VLModel]:
    """Builder of tiny models whose units have weights large enough that every factor differs."""

    def make(kind: str, placed: list[Placement], **changes: Any) -> VLModel:
        module_class, folder = {"bart": (VLBart, tiny_backbone), "t5": (VLT5, tiny_t5)}[kind]
        torch.manual_seed(1)
        rules = ["visual_embedding"]
        model = module_class(str(folder), placed, rules, feature_dim=FEATURE_DIM, grid=2, **changes).build().eval()
        with torch.no_grad():
            for parameter in model.unit_parameters().values():
                parameter.requires_grad_().normal_(std=0.3)
        return model

    return make
