"""Preemption: end a run on a signal so that it resumes exactly."""

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
    """On SIGTERM or SIGUSR1, to any one rank: writes ``checkpoints/resume.ckpt`` and exits with status 75.

    The checkpoint is written when a step of the optimiser has ended: on one device the step that the signal came in,
    on several the one after, since the ranks have to agree. They do so on the side, by one byte a batch over gloo that
    nobody waits for before the next batch has been computed.

    A validation is left between two batches, and is run from its start when the run goes on. Of several ranks those
    that were not asked first do their share of it: ranks validate at their own pace and agree once, at its end.

    Lightning's own handlers are put aside while training. On SIGTERM they end a run without a checkpoint and look at
    rank 0 alone, after a collective call from within the handler; SLURM's requeueing writes from within the handler, in
    the middle of a step, to ``hpc_ckpt_*.ckpt`` in the root folder of all runs, from which any other run on SLURM then
    begins. Requeueing is the batch script's: see docs/cluster.md.
    """

    def __init__(self) -> None:
        self._received: int = 0
        self._stop = False
        self._group: Any = None
        self._flag = torch.zeros(1, dtype=torch.uint8)
        self._work: Any = None

    def _receive(self, number: int, frame: Any) -> None:
        self._received = number  # all else would run between any two instructions of a step

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # before training starts, when Distributed sets the timeout of all groups that are there
        self._group = torch.distributed.new_group(backend="gloo") if trainer.world_size > 1 else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._received, self._stop, self._work = 0, False, None
        for number in SIGNALS:
            signal.signal(number, self._receive)  # Lightning restores what was there before, when it tears down
        stay()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop = self._agreed() or self._stop
        if self._stop and not trainer.fit_loop._should_accumulate():  # gradients of half a step are in no checkpoint
            # as Lightning would behind this hook: the step's row
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
        # a rank that was asked waits here for the others, each of which comes by its last batch at the latest
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
        """Return whether all ranks know of a stop request; the answer is the same on every rank at the same step."""
        if self._group is None:
            return self._received > 0
        stop = self._settled()
        if not stop:
            self._reduce()
        return stop

    def _agreed_at_once(self) -> bool:
        """Return whether any rank was asked to stop; waits for all ranks."""
        if self._group is None:
            return self._received > 0
        self._settled()  # a rank that was asked before is asked still
        self._reduce()
        return self._settled()

    def _reduce(self) -> None:
        self._flag = torch.tensor([self._received > 0], dtype=torch.uint8)
        reduce = torch.distributed.ReduceOp.MAX
        self._work = torch.distributed.all_reduce(self._flag, reduce, self._group, async_op=True)

    def _settled(self) -> bool:
        """Return the result of the pending reduction; False if there is none."""
        if self._work is None:
            return False
        self._work.wait()
        self._work = None
        return bool(self._flag.item())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settled()
