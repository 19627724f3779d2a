"""Validations that were due when a checkpoint was written; they run when the run is resumed."""

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
    """Whether a validation is due next, or is running."""
    loop = trainer.fit_loop.epoch_loop
    if trainer.validating:
        batches = loop.val_loop.batch_progress
        return not batches.is_last_batch or batches.current.completed < batches.current.ready
    return _in_step(trainer) and loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]


def keep_pending_validation(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Record a pending validation, if there is one, and the end of an epoch in the loop counters of a checkpoint.

    Every n steps, Lightning 2.6 saves before the step counts as completed; a run resumed from such a checkpoint skips
    the validation that follows the step. Lightning resumes a validation only if its first batch was started, so the
    counters are set accordingly. After the last step of an epoch without a validation, Lightning omits the end of
    the epoch and its counters are wrong from then on: a run that is resumed twice trains too long. The step is
    therefore counted as completed.

    Args:
        trainer: Trainer of the run that is saved.
        checkpoint: Checkpoint about to be written; changed in place.
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
        # a validation that was resumed has one more started batch than completed ones, permanently
        batches["total"].update(dict.fromkeys(("ready", "started", "processed"), batches["total"]["completed"]))
        return
    earlier = batches["total"]["completed"] - (batches["current"]["completed"] if trainer.validating else 0)
    for counts, done in ((batches["total"], earlier), (batches["current"], 0)):
        counts.update(ready=done + 1, started=done + 1, processed=done, completed=done)
    batches["is_last_batch"] = False
