"""The order of samples whose shards come and go: mixed within and across a few shards that are there together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_modules.store.store import FeatureStore, FeatureStoreError
from data_modules.streaming.streamed_store import StreamedStore


@dataclass(frozen=True)
class ShardOrder:
    """The samples of a task in an order that needs few shards at a time.

    Shards stand in line in a random order. A sample of the shard at place ``p`` comes at ``p + window * chance``: at
    any time the samples of ``window`` shards are mixed evenly, one shard comes as another goes, and the first batch
    needs one shard. A sample of several images comes while all of them are there. If the places of its shards are
    ``window`` or more apart they never are: such samples follow at the end, pair by pair of blocks of shards.

    Args:
        shards: ``(n, N)`` shard of each image of each sample.
        count: Shards of the store. Tasks on the same store have them in the same order.
        window: Shards that are mixed.
        ahead: Shards beyond these that are fetched in advance.
    """

    shards: np.ndarray
    count: int
    window: int
    ahead: int = 0

    def shuffled(self, seed: int) -> np.ndarray:
        """A permutation of ``range(n)``, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        line = torch.randperm(self.count, generator=generator).numpy()
        chance = torch.rand(len(self.shards), dtype=torch.float64, generator=generator).numpy()
        return self._order(line, chance)

    def sorted(self) -> np.ndarray:
        """Shard by shard, within a shard in the order of the rows."""
        return self._order(np.arange(self.count), np.zeros(len(self.shards)))

    def following(self, rows: np.ndarray) -> list[int]:
        """Shards of the next rows, in the order of their use: of so many rows that ``ahead`` new ones are among them.

        Args:
            rows: The rest of an order.
        """
        near = self.shards[rows[: -(-len(self.shards) * self.ahead // self._used)]].reshape(-1)
        shards, first = np.unique(near, return_index=True)
        return [int(shard) for shard in shards[np.argsort(first)]]

    @cached_property
    def _used(self) -> int:
        return len(np.unique(self.shards))

    def _order(self, line: np.ndarray, chance: np.ndarray) -> np.ndarray:
        used = line[np.isin(line, self.shards)]
        place = np.zeros(self.count, dtype=np.int64)
        place[used] = np.arange(len(used))
        places = place[self.shards]
        first, last = places.min(axis=1), places.max(axis=1)
        together = self.window - (last - first)  # for so long all of its shards are there
        key = last + together * chance
        block = max(1, self.window // 2)
        rounds = -(-len(used) // block)
        column = np.where(first // block % 2, rounds - 1 - last // block, last // block)  # to and fro: fewer fetches
        apart = len(used) + self.window + first // block * rounds + column + chance
        return np.argsort(np.where(together > 0, key, apart), kind="stable")


class Window(NamedTuple):
    """How many shards of a store are mixed, and how many beyond these are fetched in advance."""

    window: int
    ahead: int


def windows(stores: Mapping[str, FeatureStore], images: Mapping[str, int], *, together: bool) -> dict[str, Window]:
    """Windows that fit into the cache.

    Args:
        stores: The store, by task.
        images: How many images a sample has, by task.
        together: Whether the tasks take turns, as in training; otherwise one follows the other.

    Returns:
        By task; none for tasks whose features are not streamed.

    Raises:
        FeatureStoreError: If the cache cannot hold one shard of each store, two where samples have several images.
    """
    streamed = {task: store for task, store in stores.items() if isinstance(store, StreamedStore)}
    needs: dict[Path, tuple[StreamedStore, int]] = {}
    for task, store in streamed.items():
        _, least = needs.get(store.path, (store, 1))
        needs[store.path] = (store, max(least, min(2, images[task], len(store.meta["shards"]))))
    groups = [list(needs.values())] if together else [[need] for need in needs.values()]
    slots = {store.path: _slots(group) for group in groups for store, _ in group}
    return {task: _window(slots[store.path]) for task, store in streamed.items()}


def order_of(store: FeatureStore, rows: np.ndarray, window: Window) -> ShardOrder:
    """The order of samples whose ``(n, N)`` images lie in such rows of a store."""
    return ShardOrder(store.shards_of(rows), len(store.meta["shards"]), *window)


def _window(slots: int) -> Window:
    ahead = 0 if slots < 3 else 1 if slots < 8 else 2
    return Window(max(1, slots - 1 - ahead), ahead)  # one more is there while one comes and one goes


def _slots(needs: list[tuple[StreamedStore, int]]) -> int:
    """How many shards of each store fit into the cache."""
    cache = needs[0][0].cache
    scratch = max(store.scratch_bytes for store, _ in needs)
    least = sum(store.shard_bytes * count for store, count in needs) + scratch
    if least > cache.max_bytes:
        what = ", ".join(f"{count} of {store.source.url}" for store, count in needs)
        raise FeatureStoreError(
            f"the cache {cache.folder} may have {cache.max_bytes / 1e9:,.3f} GB and needs {least / 1e9:,.3f} for the "
            f"shards that are read at the same time ({what}): raise data.init_args.stream.max_gb"
        )
    return (cache.max_bytes - scratch) // sum(store.shard_bytes for store, _ in needs)
