"""End a run on the cluster's request so that it can go on as if nothing had been."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """The run was asked to end, has written a checkpoint and can go on."""


class Preemption(Callback):
    """On SIGTERM or SIGUSR1, to any one rank: writes ``checkpoints/resume.ckpt`` and exits with status 75.

    The checkpoint is written when a step has ended: on one device the step that the signal came in, on several the one
    after, since the ranks have to agree. They do so on the side, by one byte a step over gloo that nobody waits for
    before the next step has been computed. A signal during validation counts when training goes on.

    Lightning's own handlers are put aside while training. On SIGTERM they end a run without a checkpoint and look at
    rank 0 alone, after a collective call from within the handler; SLURM's requeueing writes from within the handler, in
    the middle of a step, to ``hpc_ckpt_*.ckpt`` in the root folder of all runs, from which any other run on SLURM then
    begins. Requeueing is the batch script's: see docs/cluster.md.
    """

    def __init__(self) -> None:
        self._received: int = 0
        self._group: Any = None
        self._flag = torch.zeros(1, dtype=torch.uint8)
        self._work: Any = None

    def _receive(self, number: int, frame: Any) -> None:
        self._received = number  # all else would run between any two instructions of a step

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # before training starts, when Distributed sets the timeout of all groups that are there
        self._group = torch.distributed.new_group(backend="gloo") if trainer.world_size > 1 else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._received, self._work = 0, None
        for number in SIGNALS:
            signal.signal(number, self._receive)  # Lightning restores what was there before, when it tears down

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._agreed():
            return
        path = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "resume.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            Console(stderr=True).print(
                f"asked to end at step {trainer.global_step}: resume from {path}", soft_wrap=True
            )
        raise Preempted(STATUS)

    def _agreed(self) -> bool:
        """Whether all ranks know that one was asked to end; every rank gets the same answer at the same step."""
        if self._group is None:
            return self._received > 0
        stop = False
        if self._work is not None:
            self._work.wait()
            stop = bool(self._flag.item())
        self._flag = torch.tensor([self._received > 0], dtype=torch.uint8)
        reduce = torch.distributed.ReduceOp.MAX
        self._work = None if stop else torch.distributed.all_reduce(self._flag, reduce, self._group, async_op=True)
        return stop

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None
