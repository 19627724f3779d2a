"""Stop a run whose loss is no longer a number, before a checkpoint of it is written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlpet_lightning.batch import Batch


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class _Seen:
    finite: Tensor
    loss: Tensor
    step: int
    task: str
    ids: tuple[str, ...]


class LossGuard:
    """Looks at every loss without holding up the device.

    On a CPU a loss is looked at when it is computed. On an accelerator looking would wait for the device, so each loss
    is looked at one step later, when it has long been computed, and before a checkpoint is written.
    """

    def __init__(self) -> None:
        self._pending: _Seen | None = None

    def look(self, loss: Tensor, batch: Batch, step: int) -> None:
        """Take note of a step's loss.

        Raises:
            NonFiniteLossError: If it, or (on an accelerator) the loss of the step before, is NaN or infinite.
        """
        self.settle()
        loss = loss.detach()
        self._pending = _Seen(torch.isfinite(loss), loss, step, batch.task, tuple(batch.ids))
        if loss.device.type == "cpu":
            self.settle()

    def settle(self) -> None:
        """Check what has been noted but not looked at.

        Raises:
            NonFiniteLossError: Names task, step and question ids.
        """
        seen, self._pending = self._pending, None
        if seen is None or bool(seen.finite):
            return
        ids = ", ".join(seen.ids[:5]) + (f" and {len(seen.ids) - 5} more" if len(seen.ids) > 5 else "")
        raise NonFiniteLossError(
            f"the loss is {seen.loss.item()} at step {seen.step}, task {seen.task!r}, "
            f"question ids: {ids or 'unknown'}. Nothing was saved after it: resume from the last checkpoint with a "
            "lower learning rate, gradient clipping or float32, and look at the features of these questions"
        )
