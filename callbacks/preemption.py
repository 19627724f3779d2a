"""Exact resume after preemption: a checkpoint and an exit status on the cluster's signal."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console

from vlpet_lightning.run.signals import SIGNALS, STATUS, Preempted, stay


class Preemption(Callback):
    """Write ``checkpoints/resume.ckpt`` and exit with status 75 when any rank receives SIGTERM or SIGUSR1.

    The checkpoint is written at the end of an optimiser step. On one device this is the step in which the signal
    arrived; with several ranks it is the next step, because the ranks must agree first. They agree asynchronously by an
    all-reduce of one byte per batch over gloo, which is waited for only after the next batch has been computed.

    A signal during validation stops it between two batches, and validation restarts from its beginning on resume. With
    several ranks, those that received no signal first complete their share: ranks validate at their own pace and agree
    once, at the end.

    Lightning's own signal handlers are replaced during training. On SIGTERM they end the run without a checkpoint and
    consider rank 0 only, after a collective call inside the handler. Lightning's SLURM requeueing saves inside the
    handler, in the middle of a step, to ``hpc_ckpt_*.ckpt`` in the root folder of all runs, and any other run on SLURM
    then starts from that file. Requeueing is left to the batch script: see docs/cluster.md.
    """

    def __init__(self) -> None:
        self._received: int = 0
        self._stop = False
        self._group: Any = None
        self._flag = torch.zeros(1, dtype=torch.uint8)
        self._work: Any = None

    def _receive(self, number: int, frame: Any) -> None:
        self._received = number  # do nothing else here: a handler may run between any two instructions of a step

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # create the group before training starts, when Distributed sets the timeout of all existing groups
        self._group = torch.distributed.new_group(backend="gloo") if trainer.world_size > 1 else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._received, self._stop, self._work = 0, False, None
        for number in SIGNALS:
            signal.signal(number, self._receive)  # Lightning restores the previous handlers on teardown
        stay()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop = self._agreed() or self._stop
        if self._stop and not trainer.fit_loop._should_accumulate():  # checkpoints hold no accumulated gradients
            # log this step's metrics, which Lightning would do after this hook
            trainer._logger_connector.on_batch_end()
            trainer._logger_connector.update_train_step_metrics()
            self._leave(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        last = trainer.fit_loop.epoch_loop.val_loop.batch_progress.is_last_batch
        # a rank with a signal waits here for the others, which arrive after their last batch at the latest
        if not self._stop and (self._received or last):
            self._stop = self._agreed_at_once()
        if self._stop and not trainer.fit_loop._should_accumulate():
            self._leave(trainer)

    def _leave(self, trainer: Trainer) -> None:
        path = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "resume.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            Console(stderr=True).print(
                f"asked to end at step {trainer.global_step}: resume from {path}", soft_wrap=True
            )
        raise Preempted(STATUS)

    def _agreed(self) -> bool:
        """Check whether all ranks know of a signal; the result is the same on every rank at the same step."""
        if self._group is None:
            return self._received > 0
        stop = self._settled()
        if not stop:
            self._reduce()
        return stop

    def _agreed_at_once(self) -> bool:
        """Check whether any rank has received a signal, waiting until every rank has called this."""
        if self._group is None:
            return self._received > 0
        self._settled()  # the result can be dropped: a rank that has received a signal reports it again below
        self._reduce()
        return self._settled()

    def _reduce(self) -> None:
        self._flag = torch.tensor([self._received > 0], dtype=torch.uint8)
        reduce = torch.distributed.ReduceOp.MAX
        self._work = torch.distributed.all_reduce(self._flag, reduce, self._group, async_op=True)

    def _settled(self) -> bool:
        """Wait for the pending reduction and return its result; False if none is pending."""
        if self._work is None:
            return False
        self._work.wait()
        self._work = None
        return bool(self._flag.item())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settled()
