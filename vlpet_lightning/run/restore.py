"""A checkpoint's weights in a module, outside a trainer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vlpet_lightning.backbones import first_line

if TYPE_CHECKING:
    from vlpet_lightning.module import VLModule

SEED = "PL_GLOBAL_SEED"  # environment variable of Lightning's seed_everything


@contextmanager
def default_seed(seed: int | None) -> Iterator[None]:
    """Build new weights from this seed if ``seed_everything`` has set none."""
    if seed is None or SEED in os.environ:
        yield
        return
    os.environ[SEED] = str(seed)
    try:
        yield
    finally:
        del os.environ[SEED]


def load_checkpoint(module: VLModule, path: Path, seed: int | None) -> None:
    """Build a module and load a checkpoint into it, in evaluation mode and without settings for speed.

    Args:
        module: Module with the method of the checkpoint, not built yet.
        path: The checkpoint.
        seed: Seed of the run.

    Raises:
        ValueError: If the checkpoint has another method, or holds anything but tensors and plain values.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors and plain values: give one that fit has written "
            f"({first_line(error)})"
        ) from error
    module.pet_weights = None  # the initial weights of the run
    module.loads_weights = True
    module.compile_model = module.cuda_graphs = module.generation_graphs = False
    module.frozen_dtype = "float32"
    with default_seed(seed):
        module.configure_model()
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    module.eval()


def seed_of(setting: object) -> int | None:
    """Return the seed in a config's ``seed_everything``; None if it names none."""
    return setting if isinstance(setting, int) and not isinstance(setting, bool) else None
