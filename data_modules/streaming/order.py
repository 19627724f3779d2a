"""Shuffling of streamed samples within a window: samples of a few cached shards are mixed at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data_modules.store.rows import AnyStore
from data_modules.store.store import FeatureStoreError
from data_modules.streaming.streamed_store import StreamedStore


@dataclass(frozen=True)
class ShardOrder:
    """An order of a task's samples that needs few shards at a time.

    Shards are put in a random order. A sample of the shard at position ``p`` gets the sort key ``p + window * u`` with
    ``u`` uniform in [0, 1): at any time the samples of ``window`` shards are mixed evenly, one shard enters the window
    as another leaves it, and the first batch needs one shard. A sample of several images comes while all of its shards
    are in the window. If its shards are ``window`` or more positions apart, this never happens: such samples come at
    the end, ordered by pairs of shard blocks.

    Args:
        shards: ``(n, N)`` shard of each image of each sample.
        count: Number of shards of the store. Tasks on the same store use the same shard order.
        window: Number of shards that are mixed.
        ahead: Number of further shards to prefetch.
    """

    shards: np.ndarray
    count: int
    window: int
    ahead: int = 0

    def shuffled(self, seed: int) -> np.ndarray:
        """Return a permutation of ``range(n)``, determined by the seed."""
        generator = torch.Generator().manual_seed(seed)
        line = torch.randperm(self.count, generator=generator).numpy()
        chance = torch.rand(len(self.shards), dtype=torch.float64, generator=generator).numpy()
        return self._order(line, chance)

    def sorted(self) -> np.ndarray:
        """Return the samples sorted by shard, and in row order within a shard."""
        return self._order(np.arange(self.count), np.zeros(len(self.shards)))

    def following(self, rows: np.ndarray) -> list[int]:
        """Return the shards of the next rows in order of use, far enough ahead to contain ``ahead`` new ones.

        Args:
            rows: The remaining rows of an order.
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
        together = self.window - (last - first)  # for this long, all of its shards are in the window
        key = last + together * chance
        block = max(1, self.window // 2)
        rounds = -(-len(used) // block)
        column = np.where(first // block % 2, rounds - 1 - last // block, last // block)  # zigzag saves fetches
        apart = len(used) + self.window + first // block * rounds + column + chance
        return np.argsort(np.where(together > 0, key, apart), kind="stable")


class Window(NamedTuple):
    """Number of shards of a store that are mixed, and number of further shards to prefetch."""

    window: int
    ahead: int


def windows(stores: Mapping[str, AnyStore], images: Mapping[str, int], *, together: bool) -> dict[str, Window]:
    """Compute windows that fit into the cache.

    Args:
        stores: Store of each task.
        images: Number of images per sample, for each task.
        together: Whether the tasks are interleaved, as in training; otherwise they run one after the other.

    Returns:
        Window of each task whose features are streamed.

    Raises:
        FeatureStoreError: If the cache cannot hold one shard of each store (two if samples have several images).
    """
    streamed = {task: store for task, store in stores.items() if isinstance(store, StreamedStore)}
    needs: dict[Path, tuple[StreamedStore, int]] = {}
    for task, store in streamed.items():
        _, least = needs.get(store.path, (store, 1))
        needs[store.path] = (store, max(least, min(2, images[task], len(store.meta["shards"]))))
    groups = [list(needs.values())] if together else [[need] for need in needs.values()]
    slots = {store.path: _slots(group) for group in groups for store, _ in group}
    return {task: _window(slots[store.path]) for task, store in streamed.items()}


def order_of(store: Any, rows: np.ndarray, window: Window) -> ShardOrder:
    """Return the order of samples whose images have these ``(n, N)`` rows in a store."""
    return ShardOrder(store.shards_of(rows), len(store.meta["shards"]), *window)


def _window(slots: int) -> Window:
    ahead = 0 if slots < 3 else 1 if slots < 8 else 2
    return Window(max(1, slots - 1 - ahead), ahead)  # one slot is reserved for the shard that is being replaced


def _slots(needs: list[tuple[StreamedStore, int]]) -> int:
    """Number of shards of each store that fit into the cache."""
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
