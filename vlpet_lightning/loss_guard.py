"""Stop a run whose loss is not finite, before a checkpoint of it is written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlpet_lightning.batch import Batch

SHOWN = 5  # names in an error message


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


class NonFiniteFeaturesError(NonFiniteLossError):
    """The loss became NaN or infinite because features of the batch are."""


@dataclass(frozen=True)
class _Seen:
    finite: Tensor  # in host memory
    copied: torch.cuda.Event | None  # after which it can be read
    loss: Tensor
    step: int
    batch: Batch


class LossGuard:
    """Checks every loss without stalling the device.

    On a CPU a loss is checked when it is computed. On an accelerator that would synchronise, so each loss is checked
    one step later, and before a checkpoint is written. By then its copy in host memory is complete; reading it from the
    device would wait for everything that has been queued since.
    """

    def __init__(self) -> None:
        self._pending: _Seen | None = None

    def look(self, loss: Tensor, batch: Batch, step: int) -> None:
        """Record a step's loss.

        Raises:
            NonFiniteLossError: If it, or (on an accelerator) the loss of the step before, is NaN or infinite.
        """
        self.settle()
        loss = loss.detach()
        finite, copied = torch.isfinite(loss), None
        if loss.is_cuda:
            held = torch.empty((), dtype=torch.bool, pin_memory=True)
            finite = held.copy_(finite, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._pending = _Seen(finite, copied, loss, step, batch)
        if loss.device.type == "cpu":
            self.settle()

    def settle(self) -> None:
        """Check the loss that was recorded last and has not been checked.

        Raises:
            NonFiniteFeaturesError: If features of the batch are not finite; names images, store and rows.
            NonFiniteLossError: Otherwise; names task, step and question ids.
        """
        seen, self._pending = self._pending, None
        if seen is None:
            return
        if seen.copied is not None:
            seen.copied.synchronize()
        if bool(seen.finite):
            return
        where = f"the loss is {seen.loss.item()} at step {seen.step}, task {seen.batch.task!r}"
        images = bad_images(seen.batch)
        if images:
            store = f" of {seen.batch.store}" if seen.batch.store else ""
            raise NonFiniteFeaturesError(
                f"{where}, because features of the batch are not finite: {_some(images)}{store}. Nothing was saved "
                "after it: extract or convert these images again and resume from the last checkpoint; "
                "`data check --checksums true` lists all such rows"
            )
        raise NonFiniteLossError(
            f"{where}, question ids: {_some(seen.batch.ids) or 'unknown'}. The features of the batch are finite. "
            "Nothing was saved after it: resume from the last checkpoint with a lower learning rate, gradient clipping "
            "or float32"
        )


def bad_images(batch: Batch) -> list[str]:
    """Describe the images of a batch whose features are not finite, each once, e.g. ``image COCO_7 (row 3)``."""
    count = max(1, len(batch))
    finite = torch.isfinite(batch.features).reshape(count, -1, batch.features[0].numel() // _images(batch)).all(dim=2)
    found: dict[str, None] = {}
    for sample, place in (~finite).nonzero().tolist():
        place = place if not batch.images or place < len(batch.images[sample]) else 0  # a frame of a clip
        name = batch.images[sample][place] if batch.images else f"{place} of question {batch.ids[sample]}"
        row = f" (row {batch.rows[sample][place]})" if batch.rows else ""
        found[f"image {name}{row}"] = None
    return list(found)


def _images(batch: Batch) -> int:
    return batch.features.shape[1] if batch.features.dim() == 4 else 1


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
