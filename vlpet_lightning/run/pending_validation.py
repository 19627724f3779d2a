"""A validation that was due when a checkpoint was written is run when the run is resumed."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

STEPS = "epoch_loop.batch_progress"
BATCHES = "epoch_loop.val_loop.batch_progress"


def _in_step(trainer: Trainer) -> bool:
    steps: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return steps.completed < steps.processed


def is_due(trainer: Trainer) -> bool:
    """Whether a validation comes next, or has begun and not ended."""
    loop = trainer.fit_loop.epoch_loop
    if trainer.validating:
        batches = loop.val_loop.batch_progress
        return not batches.is_last_batch or batches.current.completed < batches.current.ready
    return _in_step(trainer) and loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]


def keep_pending_validation(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Make the loops of a checkpoint begin with the validation that is due, if one is; and end an epoch in any case.

    Lightning 2.6 saves every so many steps before a step counts as completed, and takes a run that is resumed there to
    be past the validation that the step brings. It returns to a validation only where its first batch was begun:
    the counters are made to say so. After the last step of an epoch without a validation it leaves the epoch's end out,
    and its counters are wrong from then on: a run that is resumed twice trains too long. The step is made to count.

    Args:
        trainer: Whose run is saved.
        checkpoint: What it is about to write, changed in place.
    """
    if trainer.state.fn != TrainerFn.FITTING:
        return
    loops = checkpoint["loops"]["fit_loop"]
    steps, batches = loops[STEPS], loops[BATCHES]
    due = is_due(trainer)
    last = _in_step(trainer) and trainer.fit_loop.epoch_loop._num_ready_batches_reached()
    if due or last:
        for counts in (steps["total"], steps["current"]):
            counts["completed"] = counts["processed"]
    if not due:
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] += int(last)
        # a validation that was returned to has begun one batch more than it completed, ever after
        batches["total"].update(dict.fromkeys(("ready", "started", "processed"), batches["total"]["completed"]))
        return
    earlier = batches["total"]["completed"] - (batches["current"]["completed"] if trainer.validating else 0)
    for counts, done in ((batches["total"], earlier), (batches["current"], 0)):
        counts.update(ready=done + 1, started=done + 1, processed=done, completed=done)
    batches["is_last_batch"] = False
