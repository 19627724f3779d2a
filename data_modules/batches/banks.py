"""Feature banks of the training tasks; tasks on the same store share one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from data_modules.batches.dataset import TaskData
from data_modules.store.bank import FeatureBank


def fill_banks(
    tasks: Mapping[str, TaskData], *, device: torch.device, neighbours: int, rank: int, world_size: int
) -> dict[str, FeatureBank]:
    """Load the features of all training images into memory.

    Args:
        tasks: The training tasks by name.
        device: Device that holds the rows.
        neighbours: Number of ranks on this machine, which share its memory.
        rank: Rank of this process.
        world_size: Number of ranks of the run; each holds its share.

    Returns:
        The bank of each task.
    """
    banks: dict[str, FeatureBank] = {}
    for where in dict.fromkeys(data.store.where for data in tasks.values()):
        sharing = {name: data for name, data in tasks.items() if data.store.where == where}
        rows = np.concatenate([data.images.reshape(-1) for data in sharing.values()])
        store: Any = next(iter(sharing.values())).store
        bank = FeatureBank(store, rows, device=device, neighbours=neighbours, rank=rank, world_size=world_size)
        banks.update(dict.fromkeys(sharing, bank))
    return banks
