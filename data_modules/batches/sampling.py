"""Batch samplers that divide the samples among tasks and ranks; each item is a :class:`Plan` of one batch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data.distributed import DistributedSampler

from data_modules.batches.length_buckets import LengthBuckets
from data_modules.streaming.order import ShardOrder


@dataclass(frozen=True)
class Plan:
    """The samples of one batch, all from one task.

    Args:
        task: Name of the task.
        rows: ``(B,)`` int64 row numbers in the task's split.
        epoch: The epoch, for values that are drawn anew in each epoch.
        filler: Whether the batch only keeps this rank in step with the others; its samples then have weight 0.
        shares: ``rows`` of every rank, so that ranks can exchange features without communicating row numbers;
            training only.
        rank: Rank of ``rows``.
        ahead: Shards that this and the next batches of the task need, if features are streamed.
    """

    task: str
    rows: np.ndarray
    epoch: int = 0
    filler: bool = False
    shares: tuple[np.ndarray, ...] = ()
    rank: int = 0
    ahead: Sequence[int] = ()


class PlanSampler(DistributedSampler):
    """Base class of samplers that divide the samples among the ranks themselves.

    It subclasses ``DistributedSampler`` so that Lightning does not wrap it: on several devices Lightning wraps any
    other sampler in one of its own, which would divide the batches a second time.

    Args:
        sizes: Number of samples of each task.
        batch_sizes: Batch size of each task.
        rank: Rank of this process.
        world_size: Number of processes.
        orders: Sample orders of the tasks whose features are streamed.

    Raises:
        ValueError: If a task has no samples or no batch size of 1 or more.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_sizes: Mapping[str, int],
        rank: int = 0,
        world_size: int = 1,
        orders: Mapping[str, ShardOrder] | None = None,
    ) -> None:
        for task, size in sizes.items():
            if size < 1 or batch_sizes.get(task, 0) < 1:
                raise ValueError(
                    f"task {task!r} has {size} samples and batch size {batch_sizes.get(task)}: both must be 1 or more"
                )
        super().__init__(range(sum(sizes.values())), num_replicas=world_size, rank=rank)  # type: ignore[arg-type]
        self.sizes = dict(sizes)
        self.batch_sizes = dict(batch_sizes)
        self.orders = dict(orders or {})

    def __iter__(self) -> Iterator[Plan]:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def _ahead(self, task: str, rest: np.ndarray) -> Sequence[int]:
        return self.orders[task].following(rest) if task in self.orders else ()


class TaskMixSampler(PlanSampler):
    """The original's multi-task mixture: one task per step, every sample once per epoch.

    Each task's rows are permuted and split into batches; the last batch may be smaller. The task order is a shuffled
    list that contains each task once per batch and is consumed from its end (``src/multitask_data.py`` of VL-PET).
    Every rank draws the same tasks, and batches are global: rank ``r`` of ``W`` takes rows ``r, r + W, ...`` of each.
    A rank without rows gets the batch's first row as a filler. If features are streamed, the permutation needs few
    shards at a time. With length buckets, it is rearranged so that a batch has samples of similar length.

    Args:
        sizes: Number of samples of each task, in task order.
        batch_sizes: Global batch size of each task.
        seed: The run's seed.
        seeded_order: Whether the order of samples and tasks depends on the seed. The original's does not: its samplers
            have seed 0 and its tasks are shuffled by epoch only.
        rank: Rank of this process.
        world_size: Number of processes.
        orders: Sample orders of the tasks whose features are streamed.
        buckets: Length buckets of the tasks that have them.

    Raises:
        ValueError: If a task has no samples or no batch size of 1 or more.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_sizes: Mapping[str, int],
        *,
        seed: int = 0,
        seeded_order: bool = False,
        rank: int = 0,
        world_size: int = 1,
        orders: Mapping[str, ShardOrder] | None = None,
        buckets: Mapping[str, LengthBuckets] | None = None,
    ) -> None:
        super().__init__(sizes, batch_sizes, rank, world_size, orders)
        self.buckets = dict(buckets or {})
        self.order_seed = seed if seeded_order else 0
        self.batches = 0
        self._start = 0

    def __len__(self) -> int:
        return sum(-(-size // self.batch_sizes[task]) for task, size in self.sizes.items())

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; a loaded position is dropped if the epoch differs."""
        if epoch != self.epoch:
            self._start = self.batches = 0
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch and the number of its batches yielded so far."""
        return {"epoch": self.epoch, "batches": self.batches}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Resume the next iteration from a position.

        Raises:
            ValueError: If the epoch has fewer batches.
        """
        if not 0 <= state["batches"] <= len(self):
            raise ValueError(
                f"cannot resume after batch {state['batches']}: an epoch of these data has {len(self)} batches"
            )
        self.epoch = state["epoch"]
        self._start = self.batches = state["batches"]

    def __iter__(self) -> Iterator[Plan]:
        start, self._start = self._start, 0
        order = self.task_order()
        done = dict.fromkeys(self.sizes, 0)
        for task in order[:start]:
            done[task] += 1
        rows = {task: self._order(task, size) for task, size in self.sizes.items()}
        epoch = self.epoch
        for number, task in enumerate(order[start:], start):
            size = self.batch_sizes[task]
            rest = rows[task][done[task] * size :]
            done[task] += 1
            self.batches = number + 1  # before the yield: a batch counts once it is yielded
            yield self._share(Plan(task, rest[:size], epoch, ahead=self._ahead(task, rest)))

    def task_order(self) -> list[str]:
        """Return the task of every step of this epoch."""
        names = [task for task, size in self.sizes.items() for _ in range(-(-size // self.batch_sizes[task]))]
        # a string seeds with all its bits; the epoch number alone is the original's seed
        key: int | str = f"{self.order_seed}/{self.epoch}" if self.order_seed else self.epoch
        random.Random(key).shuffle(names)
        return names[::-1]

    def _order(self, task: str, size: int) -> np.ndarray:
        order = self._permutation(task, size)
        if task not in self.buckets:
            return order
        return self.buckets[task].arranged(order, self.batch_sizes[task], self.order_seed + self.epoch)

    def _permutation(self, task: str, size: int) -> np.ndarray:
        if task in self.orders:
            return self.orders[task].shuffled(self.order_seed + self.epoch)
        # same as torch's DistributedSampler with one replica; its seed is 0 in the original
        generator = torch.Generator().manual_seed(self.order_seed + self.epoch)
        return torch.randperm(size, generator=generator).numpy()

    def _share(self, batch: Plan) -> Plan:
        split = [batch.rows[rank :: self.num_replicas] for rank in range(self.num_replicas)]
        shares = tuple(share if len(share) else batch.rows[:1] for share in split)
        rows, filler = shares[self.rank], not len(split[self.rank])
        return replace(batch, rows=rows, filler=filler, shares=shares, rank=self.rank)


class EvalSampler(PlanSampler):
    """Every sample once over all ranks, task by task, in file order or from the longest input to the shortest.

    The batches are the same as on one device and are dealt to the ranks in turn, so that predictions do not depend on
    the number of ranks. This matters because batch padding changes the small gate's output under the original's
    protocol, and batch shape changes the last digits everywhere. If there are fewer batches than ranks, ranks without
    one repeat the first batch, because a rank that evaluates nothing would leave the others waiting; samples are
    deduplicated by id. If features are streamed, samples come shard by shard instead.

    Args:
        sizes: Number of samples of each task.
        batch_sizes: Batch size of each task.
        rank: Rank of this process.
        world_size: Number of processes.
        orders: Sample orders of the tasks whose features are streamed.
        lengths: ``(n,)`` input lengths of the tasks whose samples are sorted by length. The longest ones come first,
            so that the first batch needs the most memory.

    Raises:
        ValueError: If a task has no samples or no batch size of 1 or more.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_sizes: Mapping[str, int],
        rank: int = 0,
        world_size: int = 1,
        orders: Mapping[str, ShardOrder] | None = None,
        lengths: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        super().__init__(sizes, batch_sizes, rank, world_size, orders)
        self.lengths = dict(lengths or {})

    def __len__(self) -> int:
        return len(self._mine())

    def _mine(self) -> range:
        """Numbers of this rank's batches, counted over all tasks."""
        batches = sum(-(-size // self.batch_sizes[task]) for task, size in self.sizes.items())
        return range(self.rank, batches, self.num_replicas) or range(1)

    def __iter__(self) -> Iterator[Plan]:
        mine, first = self._mine(), 0
        for task, size in self.sizes.items():
            order = self._order(task, size)
            step = self.batch_sizes[task]
            batches = [order[start : start + step] for start in range(0, size, step)]
            kept = [rows for number, rows in enumerate(batches, first) if number in mine]
            first += len(batches)
            for index, rows in enumerate(kept):
                yield Plan(task, rows, ahead=self._ahead(task, np.concatenate(kept[index:])))

    def _order(self, task: str, size: int) -> np.ndarray:
        if task in self.orders:
            return self.orders[task].sorted()
        if task in self.lengths:
            return np.argsort(-self.lengths[task], kind="stable")
        return np.arange(size)
