"""The training loader, and the check that a checkpoint's position within an epoch still means the same samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from torch.utils.data import DataLoader

from data_modules.batches.dataset import TaskDataset
from data_modules.batches.sampling import TaskMixSampler
from vlpet_lightning.batch import Batch


class ResumingLoader(DataLoader):
    """A loader that opens at its first batch, after the ``position`` batches of the epoch that were trained on.

    Lightning makes the iterator before it has restored a run and before it says which epoch it is, and it does not hand
    a loader its state where a schedule asks for the number of steps first. But its checkpoints count the batches:
    that count is the only record of the position, so nothing can disagree with it.

    Args:
        dataset: The batches.
        sampler: The plans, resumable.
        position: Says how many batches of this epoch are done.
        kwargs: As for ``torch.utils.data.DataLoader``.
    """

    def __init__(
        self, dataset: TaskDataset, sampler: TaskMixSampler, position: Callable[[], int], **kwargs: Any
    ) -> None:
        super().__init__(dataset, sampler=sampler, **kwargs)
        self.position = position

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        sampler = cast(TaskMixSampler, self.sampler)
        sampler.load_state_dict({"epoch": sampler.epoch, "batches": self.position()})
        yield from super().__iter__()

    def state_dict(self) -> dict[str, int]:
        """Nothing: having a state tells Lightning that this loader can resume within an epoch."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing: see above."""


def check_same_epoch(state: Mapping[str, Any], batches: int, windows: Mapping[str, list[int]]) -> None:
    """Check that an epoch has the batches that it had when the checkpoint was written.

    Args:
        state: The data module's state in the checkpoint; without ``batches_per_epoch`` nothing is checked.
        batches: Batches of an epoch now.
        windows: By streamed task, the shards that are mixed at once and the shards of its store, now.

    Raises:
        ValueError: If it has not, or not in this order: a position within it would mean other samples.
    """
    then = state.get("batches_per_epoch")
    if then is None:
        return
    if then != batches:
        raise ValueError(
            f"cannot resume: an epoch had {then} batches when the checkpoint was written and has {batches} now. Use "
            "the same tasks, batch sizes and limits"
        )
    mixed = state.get("windows", {})
    if mixed != windows:
        raise ValueError(
            f"cannot resume: samples were mixed over {mixed or 'all'} shards when the checkpoint was written (by "
            f"task: window, shards of the store) and are over {windows or 'all'} now. Use the same "
            "features and data.init_args.stream, max_gb above all"
        )
