"""Features held in a device's memory: loaded once, gathered there, and shared out over the ranks of a run.

A batch then travels with row numbers instead of features, which are put in on the device. Of ``W`` ranks each holds a
``W``-th of the images, and they exchange what a batch needs.
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

CHUNK = 256  # rows read at once
AHEAD = 3  # shards that a streamed store fetches before they are read
HEADROOM = 0.9  # of the free memory; the rest is for the model


class TooLargeForMemory(ValueError):
    """Features that do not fit into a device's memory."""


@dataclass
class Pending:
    """A batch whose features are still to be gathered from a bank.

    Args:
        batch: The batch without features.
        rows: Of each rank, the ``(B * N,)`` store rows of its samples' images.
        rank: Whose batch this is.
    """

    batch: Batch
    rows: list[np.ndarray]
    rank: int

    def __len__(self) -> int:
        return len(self.batch)

    def to(self, device: torch.device | str) -> Pending:
        """The same with its tensors on a device."""
        return replace(self, batch=self.batch.to(device))

    def pin_memory(self) -> Pending:
        """The same with its tensors in page-locked memory."""
        return replace(self, batch=self.batch.pin_memory())


class FeatureBank:
    """Rows of a store in memory, in the store's own encoding: 8-bit rows take half the room here, too.

    Args:
        store: The store.
        rows: The rows that are needed, in any order, repeated or not; the same on every rank.
        device: Where to hold them.
        rank: This process.
        world_size: Processes that share the rows.
        neighbours: Those of them on this machine, whose shares lie in the same memory where the device is the CPU.

    Raises:
        TooLargeForMemory: If they do not fit.
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
        self._meet()  # before it, others may still be loading another store
        check_memory(store, size * (neighbours if device.type == "cpu" else 1), device)
        self._meet()  # behind it, others begin to load
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
        """Memory that this rank's part takes."""
        return self.values.numel() * self.values.element_size()

    def gather(self, rows: Sequence[np.ndarray]) -> Tensor:
        """Features of this rank's rows; every rank must call it, with the same rows.

        Args:
            rows: Of each rank, ``(n,)`` row numbers of the store.

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
        back = np.empty(len(mine), dtype=np.int64)  # they come ordered by owner
        back[np.argsort(owners, kind="stable")] = np.arange(len(mine))
        return self.encoding.decoded(received[torch.from_numpy(back).to(received.device)])

    def _held(self, places: np.ndarray) -> Tensor:
        return self.values[torch.from_numpy(places).to(self.values.device)]


def _group(device: torch.device) -> dist.ProcessGroup | None:
    if device.type == "cpu" and "gloo" not in dist.get_backend():
        return dist.new_group(backend="gloo")  # NCCL moves what is on GPUs alone
    return None


def check_memory(store: FeatureStore, needed: int, device: torch.device) -> None:
    """Look whether a device has room.

    Raises:
        TooLargeForMemory: If it has not.
    """
    free = free_memory(device)
    if free is not None and needed > HEADROOM * free:
        raise TooLargeForMemory(
            f"the features of {store.where} need {needed / 1e9:,.3g} GB on {device}, and {free / 1e9:,.3g} GB are "
            "free: store them in 8 bits (python -m vlpet_lightning data recode --rows uint8), share them out over more "
            "devices, or set data.init_args.bank to null"
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that a device has free; None where it cannot be asked."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_ram()
