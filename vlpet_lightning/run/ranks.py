"""Synchronised end of all ranks, and errors that name a lost rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only

# gloo raises plain RuntimeErrors that begin with the location in its source; NCCL has its own error classes
GLOO = "gloo/transport"
CLASSES = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)


class RankLost(RuntimeError):
    """Another rank has ended or does not respond."""


def is_first_process() -> bool:
    """Whether this is rank 0, also before a process group exists and in processes that a launcher starts."""
    node = int(os.environ.get("GROUP_RANK", os.environ.get("NODE_RANK", 0)))
    return getattr(rank_zero_only, "rank", 0) == 0 and node == 0


def set_timeout(timeout: timedelta) -> None:
    """Set the timeout for the other ranks in every process group of this process."""
    if dist.is_available() and dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timeout, group)


def reason_of_loss(error: BaseException) -> str | None:
    """Return a backend's message about an unreachable rank, or None for any other error."""
    text = str(error)
    if not isinstance(error, CLASSES) and GLOO not in text:
        return None
    return text.strip().partition("\n")[0].partition("] ")[2] if GLOO in text else text.strip().partition("\n")[0]


@contextmanager
def ending_together() -> Iterator[None]:
    """Context manager around a run that makes all ranks exit together; an early exit can abort a rank still in contact.

    Raises:
        RankLost: Instead of torch's error, if another rank has ended early or does not respond.
    """
    try:
        yield
        _part()
    except SystemExit as end:
        if end.code == os.EX_TEMPFAIL:  # callbacks.Preemption: all ranks end at the same step
            with suppress(RuntimeError):  # the checkpoint is written, so losing a rank now has no effect
                _part()
        raise
    except RuntimeError as error:
        reason = reason_of_loss(error)
        if reason is None:
            raise
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        raise RankLost(
            f"rank {rank} of {size} has lost another one: {reason}. The log of that rank says why it ended; if it says "
            "nothing, its node or the network failed (or it is slow: see the timeout of callbacks.Distributed). "
            "Restart all ranks: with --ckpt_path auto the run resumes from its newest checkpoint"
        ) from error


def _part() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)
        dist.destroy_process_group()
