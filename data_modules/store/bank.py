"""Features held in a device's memory: loaded once, gathered on the device, and sharded over the ranks of a run.

Batches carry row numbers instead of features; the features are added on the device. Each of ``W`` ranks holds one
``W``-th of the images, and the ranks exchange the rows that a batch needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor

from data_modules.store.memory import free_ram
from data_modules.store.store import FeatureStore
from vlpet_lightning.batch import Batch

CHUNK = 256  # rows per read
AHEAD = 3  # shards that a streamed store prefetches
HEADROOM = 0.9  # usable share of the free memory; the rest is for the model


class TooLargeForMemory(ValueError):
    """Raised when features do not fit into a device's memory."""


@dataclass
class Pending:
    """A batch whose features have not been gathered from the bank yet.

    Args:
        batch: The batch without features.
        rows: For each rank, the ``(B * N,)`` store rows of its samples' images.
        rank: Rank that this batch belongs to.
    """

    batch: Batch
    rows: list[np.ndarray]
    rank: int

    def __len__(self) -> int:
        return len(self.batch)

    def to(self, device: torch.device | str) -> Pending:
        """Return a copy with its tensors on a device."""
        return replace(self, batch=self.batch.to(device))

    def pin_memory(self) -> Pending:
        """Return a copy with its tensors in page-locked memory."""
        return replace(self, batch=self.batch.pin_memory())


class FeatureBank:
    """In-memory rows of a store, in the store's own encoding: 8-bit rows take half the memory.

    Args:
        store: The store.
        rows: Rows to hold, in any order, with or without duplicates; the same on every rank.
        device: Device to hold them on.
        rank: Rank of this process.
        world_size: Number of processes that share the rows.
        neighbours: Number of these processes on this machine. If the device is the CPU, their shares lie in the same
            memory.

    Raises:
        TooLargeForMemory: If the rows do not fit.
        FeatureStoreError: If a shard is missing or damaged.
    """

    def __init__(
        self,
        store: FeatureStore,
        rows: np.ndarray,
        *,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        neighbours: int = 1,
    ) -> None:
        self.encoding = store.encoding
        self.rank = rank
        self.world_size = world_size
        needed = np.unique(rows)
        self.places = np.full(len(store), -1, dtype=np.int64)
        self.places[needed] = np.arange(len(needed))
        mine = needed[rank::world_size]
        shape = store.encoding.shape(store.tokens, store.dim)
        self.group = _group(device) if world_size > 1 else None
        size = len(mine) * int(np.prod(shape)) * store.encoding.dtype.itemsize
        self._meet()  # until here, other ranks may still be loading another store
        check_memory(store, size * (neighbours if device.type == "cpu" else 1), device)
        self._meet()  # from here on, other ranks start to load
        kind = torch.from_numpy(np.empty(0, dtype=store.encoding.dtype)).dtype
        self.values = torch.empty((len(mine), *shape), dtype=kind, device=device)
        name = f"loading {store.path.name} into {'memory' if device.type == 'cpu' else device}"
        shards = store.shards_of(mine)
        for start in track(range(0, len(mine), CHUNK), description=name, disable=rank > 0, transient=True):
            store.expect(np.unique(shards[start:])[:AHEAD].tolist())
            chunk = torch.from_numpy(store.stored(mine[start : start + CHUNK]))
            self.values[start : start + len(chunk)] = chunk

    def _meet(self) -> None:
        if self.world_size > 1:
            dist.barrier(self.group)

    @property
    def bytes(self) -> int:
        """Memory in bytes used by this rank's part."""
        return self.values.numel() * self.values.element_size()

    def gather(self, rows: Sequence[np.ndarray]) -> Tensor:
        """Gather the features of this rank's rows; a collective call, with the same arguments on every rank.

        Args:
            rows: For each rank, ``(n,)`` row numbers of the store.

        Returns:
            ``(n, tokens, dim)`` float16 of this rank's rows, on the bank's device.
        """
        mine = self.places[rows[self.rank]]
        if self.world_size == 1:
            return self.encoding.decoded(self._held(mine))
        wanted = [self.places[rows[other]] for other in range(self.world_size)]
        sent = [places[places % self.world_size == self.rank] // self.world_size for places in wanted]
        owners = mine % self.world_size
        received = self.values.new_empty((len(mine), *self.values.shape[1:]))
        counts = np.bincount(owners, minlength=self.world_size).tolist()
        dist.all_to_all_single(received, self._held(np.concatenate(sent)), counts, list(map(len, sent)), self.group)
        back = np.empty(len(mine), dtype=np.int64)  # rows arrive ordered by owner
        back[np.argsort(owners, kind="stable")] = np.arange(len(mine))
        return self.encoding.decoded(received[torch.from_numpy(back).to(received.device)])

    def _held(self, places: np.ndarray) -> Tensor:
        return self.values[torch.from_numpy(places).to(self.values.device)]


def _group(device: torch.device) -> dist.ProcessGroup | None:
    if device.type == "cpu" and "gloo" not in dist.get_backend():
        return dist.new_group(backend="gloo")  # NCCL only supports GPU tensors
    return None


def check_memory(store: FeatureStore, needed: int, device: torch.device) -> None:
    """Check that a device has enough free memory.

    Raises:
        TooLargeForMemory: If it does not.
    """
    free = free_memory(device)
    if free is not None and needed > HEADROOM * free:
        raise TooLargeForMemory(
            f"the features of {store.where} need {needed / 1e9:,.3g} GB on {device}, and {free / 1e9:,.3g} GB are "
            "free: store them in 8 bits (python -m vlpet_lightning data recode --rows uint8), share them out over more "
            "devices, or set data.init_args.bank to null"
        )


def free_memory(device: torch.device) -> int | None:
    """Free memory of a device in bytes; None if it cannot be determined."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_ram()
