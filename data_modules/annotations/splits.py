"""Checks within and across splits: no training on evaluation images, and references that can be scored."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Set
from itertools import product
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_only

from data_modules.annotations.records import AnnotationError, Samples, images_of
from data_modules.store.store import SHOWN
from vlpet_lightning.tasks import TASKS, TaskSpec

Part = tuple[str, str]  # task and split
# stores with ids in common; equal ids in other stores do not refer to the same images and are not compared
SAME_IDS = {"VG": "GQA"}  # GQA's train and valid images are Visual Genome's, with the same ids in both


class Leak(NamedTuple):
    """Images shared by two parts that must be disjoint.

    Args:
        one: The part used for training or model selection.
        other: The part used for evaluation.
        images: Sorted ids of the shared images.
        of: Number of images in the other part.
    """

    one: Part
    other: Part
    images: list[str]
    of: int

    def __str__(self) -> str:
        kind = "images" if TASKS[self.one[0]].subtitles is None else "clips"
        return (
            f"{len(self.images):,} of {self.of:,} {kind} of {' '.join(self.other)} are in {' '.join(self.one)}, too: "
            f"{some(self.images)}"
        )


def some(ids: list[str]) -> str:
    """Format the first ids for a message."""
    return ", ".join(ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")


def val_is_test(spec: TaskSpec) -> bool:
    """Whether a task's validation and test samples are the same by design, as in GQA."""
    # if one file holds all splits, as Karpathy's, its records name their split
    return spec.splits["train"] != spec.splits["val"] == spec.splits["test"]


def leaks(images: Mapping[Part, Set[str]]) -> Iterator[Leak]:
    """Find evaluation images in any task's training split, and test images in the same task's validation split.

    Args:
        images: Image ids of each part.
    """
    for one, other in product(images, images):
        trained = one[1] == "train" and other[1] != "train"
        selected = one == (other[0], "val") and other[1] == "test" and not val_is_test(TASKS[one[0]])
        if (trained or selected) and _ids_of(one) == _ids_of(other):
            shared = images[one] & images[other]
            if shared:
                yield Leak(one, other, sorted(shared), len(images[other]))


def _ids_of(part: Part) -> str:
    store = TASKS[part[0]].splits[part[1]].features
    return SAME_IDS.get(store, store)


def wordless(samples: Samples) -> list[str]:
    """Return the ids of samples whose reference captions contain no word: the caption metrics would reject them."""
    return [
        id
        for id, reference in zip(samples.ids, samples.references, strict=False)  # a training split has no references
        if "captions" in reference and not any(caption.split() for caption in reference["captions"])
    ]


def check_before_run(samples: Mapping[Part, Samples]) -> None:
    """Run the checks that are cheap once the annotations are read; `data check` runs the others.

    Warns if evaluation images are in a training split.

    Args:
        samples: Samples of each part.

    Raises:
        AnnotationError: If captions cannot be scored: the run would stop at the end of its first validation.
    """
    for (task, split), read in samples.items():
        empty = wordless(read)
        if empty:
            raise AnnotationError(
                f"{len(empty)} samples of {task} {split} have no reference with a word in it, so that they cannot be "
                f"scored: {some(empty)}. Take them out of the annotations"
            )
    if any(split == "train" for _, split in samples):
        _warn_of_leaks(samples)


@rank_zero_only
def _warn_of_leaks(samples: Mapping[Part, Samples]) -> None:
    for leak in leaks({part: images_of(read) for part, read in samples.items()}):
        warnings.warn(f"trained on and evaluated: {leak}", stacklevel=2)
