"""Which samples a step takes: samplers that hand out whole batches as :class:`Plan`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data.distributed import DistributedSampler

from data_modules.streaming.order import ShardOrder


@dataclass(frozen=True)
class Plan:
    """The samples of one batch; all of one task.

    Args:
        task: Name of the task.
        rows: ``(B,)`` int64 row numbers in the task's split.
        epoch: The epoch, for what is drawn anew in each.
        filler: Whether the batch only keeps this rank in step with the others: its samples have weight 0.
        shares: While training, the ``rows`` of every rank: what they exchange is known to all.
        rank: Whose ``rows`` they are.
        ahead: Shards that this batch and the next ones of the task need, where features are streamed.
    """

    task: str
    rows: np.ndarray
    epoch: int = 0
    filler: bool = False
    shares: tuple[np.ndarray, ...] = ()
    rank: int = 0
    ahead: Sequence[int] = ()


class PlanSampler(DistributedSampler):
    """Base of samplers that divide the samples among the ranks themselves.

    It is a ``DistributedSampler`` so that Lightning leaves it as it is: around any other sampler Lightning puts one of
    its own on several devices, and that would divide the batches a second time.

    Args:
        sizes: Samples of each task.
        batch_sizes: Samples of a batch, for each task.
        rank: This process.
        world_size: Processes.
        orders: The orders of tasks whose features are streamed.

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
    """The original's mixture of tasks: every step draws one task, every sample comes once an epoch.

    Each task's rows are permuted and cut into batches, the last one as long as it comes out; the order of tasks is a
    shuffled list with each task as often as it has batches, taken from its end (``src/multitask_data.py`` of VL-PET).
    Every rank draws the same tasks, and a batch is the one of all ranks together: rank ``r`` of ``W`` takes its rows
    ``r, r + W, ...``. A rank without rows gets the batch's first row as a filler. Where features are streamed, the
    permutation is one that needs few shards at a time.

    Args:
        sizes: Samples of each task, in the order of the tasks.
        batch_sizes: Samples of a batch over all ranks, for each task.
        seed: The run's seed.
        seeded_order: Whether the order of samples and tasks depends on the seed. The original's does not: its samplers
            have seed 0 and its tasks are shuffled with the epoch alone.
        rank: This process.
        world_size: Processes.
        orders: The orders of tasks whose features are streamed.

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
    ) -> None:
        super().__init__(sizes, batch_sizes, rank, world_size, orders)
        self.order_seed = seed if seeded_order else 0
        self.batches = 0
        self._start = 0

    def __len__(self) -> int:
        return sum(-(-size // self.batch_sizes[task]) for task, size in self.sizes.items())

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is; a loaded position holds for its own epoch only."""
        if epoch != self.epoch:
            self._start = self.batches = 0
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """The position: the epoch and the batches of it that were handed out."""
        return {"epoch": self.epoch, "batches": self.batches}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Make the next iteration go on from a position.

        Raises:
            ValueError: If the epoch has fewer batches.
        """
        if not 0 <= state["batches"] <= len(self):
            raise ValueError(
                f"cannot go on after batch {state['batches']}: an epoch of these data has {len(self)} batches"
            )
        self.epoch = state["epoch"]
        self._start = self.batches = state["batches"]

    def __iter__(self) -> Iterator[Plan]:
        start, self._start = self._start, 0
        order = self.task_order()
        done = dict.fromkeys(self.sizes, 0)
        for task in order[:start]:
            done[task] += 1
        rows = {task: self._permutation(task, size) for task, size in self.sizes.items()}
        epoch = self.epoch
        for number, task in enumerate(order[start:], start):
            size = self.batch_sizes[task]
            rest = rows[task][done[task] * size :]
            done[task] += 1
            self.batches = number + 1  # before the yield: a batch counts once it is handed out
            yield self._share(Plan(task, rest[:size], epoch, ahead=self._ahead(task, rest)))

    def task_order(self) -> list[str]:
        """The task of every step of this epoch."""
        names = [task for task, size in self.sizes.items() for _ in range(-(-size // self.batch_sizes[task]))]
        # a string seeds with all its bits; the number alone is the original's
        key: int | str = f"{self.order_seed}/{self.epoch}" if self.order_seed else self.epoch
        random.Random(key).shuffle(names)
        return names[::-1]

    def _permutation(self, task: str, size: int) -> np.ndarray:
        if task in self.orders:
            return self.orders[task].shuffled(self.order_seed + self.epoch)
        # torch's DistributedSampler on one replica; its seed is 0 in the original
        generator = torch.Generator().manual_seed(self.order_seed + self.epoch)
        return torch.randperm(size, generator=generator).numpy()

    def _share(self, batch: Plan) -> Plan:
        split = [batch.rows[rank :: self.num_replicas] for rank in range(self.num_replicas)]
        shares = tuple(share if len(share) else batch.rows[:1] for share in split)
        rows, filler = shares[self.rank], not len(split[self.rank])
        return replace(batch, rows=rows, filler=filler, shares=shares, rank=self.rank)


class EvalSampler(PlanSampler):
    """Every sample once over all ranks, one task after the other, in the order of the files.

    The batches are those of one device, handed out to the ranks in turn, so that answers do not depend on the number of
    ranks: under the original's protocol the small gate's output depends on the padding of the batch, and everywhere its
    shape decides about last digits. Of fewer batches than ranks, ranks without one repeat the first (a rank that
    evaluates nothing would leave the others waiting): a sample counts once by its id. Where features are streamed,
    samples come shard by shard instead.
    """

    def __len__(self) -> int:
        return len(self._mine())

    def _mine(self) -> range:
        """Numbers of this rank's batches, of all tasks together."""
        batches = sum(-(-size // self.batch_sizes[task]) for task, size in self.sizes.items())
        return range(self.rank, batches, self.num_replicas) or range(1)

    def __iter__(self) -> Iterator[Plan]:
        mine, first = self._mine(), 0
        for task, size in self.sizes.items():
            order = self.orders[task].sorted() if task in self.orders else np.arange(size)
            step = self.batch_sizes[task]
            batches = [order[start : start + step] for start in range(0, size, step)]
            kept = [rows for number, rows in enumerate(batches, first) if number in mine]
            first += len(batches)
            for index, rows in enumerate(kept):
                yield Plan(task, rows, ahead=self._ahead(task, np.concatenate(kept[index:])))
