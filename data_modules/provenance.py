"""Provenance of a data module's samples and features, for the protocol record of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_modules.annotations.image_text import VQA_ANSWER_FILES, files_of, find_file
from data_modules.annotations.published import SAMPLES
from data_modules.batches.dataset import TaskData
from data_modules.store.checksums import describe_store, file_checksums
from vlpet_lightning.tasks import TaskSpec


def provenance_of(
    root: Path,
    tasks: Mapping[str, TaskSpec],
    split: str,
    data: Mapping[str, TaskData],
    part: str,
    questions: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Describe one split of each task: annotation files, their checksums, samples and feature store.

    Args:
        root: The data root.
        tasks: The tasks by name.
        split: ``train``, ``val`` or ``test``.
        data: The samples of each task that were read.
        part: The part of the split that these are, e.g. ``whole``.
        questions: Question file of an evaluation server, for tasks whose samples are from one.

    Raises:
        FileNotFoundError: If an annotation file was removed in the meantime.
    """
    asked = {name: Path(path) for name, path in (questions or {}).items()}
    paths = {
        name: {asked[name].name: asked[name]} if name in asked else dict(_files(root, spec, split))
        for name, spec in tasks.items()
    }
    sums = file_checksums(path for files in paths.values() for path in files.values())
    return {
        name: {
            "part": "questions of a server" if name in asked else part,
            "samples": len(data[name]),
            "published_samples": None if name in asked else SAMPLES.get((name, split)),
            "annotations": {file: sums[path] for file, path in files.items()},
            "store": {"name": tasks[name].splits[split].features, **describe_store(data[name].store)},
        }
        for name, files in paths.items()
    }


def _files(root: Path, spec: TaskSpec, split: str) -> Iterable[tuple[str, Path]]:
    for name in files_of(spec, split):
        try:
            yield name, find_file(root, name)
        except FileNotFoundError:
            if name not in VQA_ANSWER_FILES:  # a split may need only one of the two
                raise
