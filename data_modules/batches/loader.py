"""The resumable training loader, and the check that a checkpoint's position in an epoch refers to the same samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from torch.utils.data import DataLoader

from data_modules.batches.dataset import TaskDataset
from data_modules.batches.sampling import TaskMixSampler
from vlpet_lightning.batch import Batch


class ResumingLoader(DataLoader):
    """A loader that reads its start position, the number of batches already trained on, when the first batch is drawn.

    Lightning creates the iterator before it restores a run and before it sets the epoch. It also does not restore a
    loader's state if a schedule needs the number of steps first. Its checkpoints do count the batches: this count is
    the only record of the position, so there are no two records to disagree.

    Args:
        dataset: The batches.
        sampler: The plans, resumable.
        position: Returns the number of finished batches of this epoch.
        kwargs: Arguments of ``torch.utils.data.DataLoader``.
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
        """Return an empty state; the method tells Lightning that this loader can resume in mid-epoch."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Do nothing: the position comes from the checkpoint's batch count."""


def check_same_epoch(
    state: Mapping[str, Any], batches: int, windows: Mapping[str, list[int]], buckets: Mapping[str, list[int]]
) -> None:
    """Check that an epoch has the same batches as when the checkpoint was written.

    Args:
        state: The data module's state in the checkpoint; without ``batches_per_epoch`` nothing is checked.
        batches: Current number of batches per epoch.
        windows: Current number of shards mixed at once and number of shards in the store, by streamed task.
        buckets: Current fingerprints of the length buckets, by task.

    Raises:
        ValueError: If the number or the order of batches differs, so that a position would refer to other samples.
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
    if state.get("buckets", {}) != buckets:
        then, now = (sizes_of_buckets(found) for found in (state.get("buckets", {}), buckets))
        changed = f"was {then} when the checkpoint was written and is {now} now" if then != now else "is the same"
        raise ValueError(
            f"cannot resume: batches are put together by length, and data.init_args.length_buckets {changed}. Use the "
            "same length_buckets, tokenizer, prompts and annotations"
        )


def sizes_of_buckets(buckets: Mapping[str, list[int]]) -> int:
    """Return the number of batches per mega-batch, 0 without length buckets."""
    return next(iter(buckets.values()))[0] if buckets else 0
