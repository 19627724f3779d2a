"""The ranks of a run end together, and say so when one of them is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only

# gloo raises plain RuntimeErrors, which begin with the place in its source; NCCL's have classes of their own
GLOO = "gloo/transport"
CLASSES = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)


class RankLost(RuntimeError):
    """Another rank has ended, or does not answer."""


def is_first_process() -> bool:
    """Whether this is rank 0, also before a process group exists and in processes that a launcher starts."""
    node = int(os.environ.get("GROUP_RANK", os.environ.get("NODE_RANK", 0)))
    return getattr(rank_zero_only, "rank", 0) == 0 and node == 0


def set_timeout(timeout: timedelta) -> None:
    """Say how long this process waits for the others, in every process group that it is in."""
    if dist.is_available() and dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timeout, group)


def reason_of_loss(error: BaseException) -> str | None:
    """What a backend says about a rank that it no longer reaches; None where the error is about something else."""
    text = str(error)
    if not isinstance(error, CLASSES) and GLOO not in text:
        return None
    return text.strip().partition("\n")[0].partition("] ")[2] if GLOO in text else text.strip().partition("\n")[0]


@contextmanager
def ending_together() -> Iterator[None]:
    """Around a run: no rank goes while another still talks to it, which can abort that one in its last breath.

    Raises:
        RankLost: In place of what torch says if another rank has ended early, or does not answer.
    """
    try:
        yield
        _part()
    except SystemExit as end:
        if end.code == os.EX_TEMPFAIL:  # callbacks.Preemption: all ranks end, at the same step
            with suppress(RuntimeError):  # the checkpoint is written: whoever is lost now changes nothing
                _part()
        raise
    except RuntimeError as error:
        reason = reason_of_loss(error)
        if reason is None:
            raise
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        raise RankLost(
            f"rank {rank} of {size} has lost another one: {reason}. What ended that rank is in its own log; where "
            "nothing is, its node or the network is gone (or it is slow: see the timeout of callbacks.Distributed). "
            "Start all ranks again: with --ckpt_path auto the run goes on from its newest checkpoint"
        ) from error


def _part() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)
        dist.destroy_process_group()
