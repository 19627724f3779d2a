"""Question ids of a split, from the official question files and the benchmark's processed ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data_modules.annotations.records import AnnotationError
from data_modules.scoring.truths import Reference, read_json, records_of, starts_with

IDS: dict[str, tuple[tuple[str, ...], Callable[[Reference], object]]] = {
    # keys under which the list of records may be, and the id of a record
    "vqa": (("questions", "annotations"), lambda record: record["question_id"]),
    "gqa": ((), lambda record: record["question_id"]),
    "nlvr2": ((), lambda record: record["identifier"]),
    "caption": (("images",), lambda record: record.get("cocoid", record.get("id"))),
    "tvqa": ((), lambda record: record["qid"]),
    "how2qa": ((), lambda record: record["qid"]),
    "tvc": ((), lambda record: record["clip_id"]),
    "yc2c": ((), lambda record: record["clip_id"]),
}


def question_ids(task: str, path: Path) -> set[str]:
    """Return the ids that a server expects answers to.

    Args:
        task: Name of a task.
        path: File of the split's questions: VQA's and GQA's question files, NLVR2's annotations, COCO's image_info
            file, VALUE's release files, or a processed file. It may be compressed (``.gz``).

    Raises:
        FileNotFoundError: If there is no such file.
        AnnotationError: If it cannot be used.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--questions: there is no file {path}")
    if task == "gqa" and starts_with(path, b"{"):
        return set(map(str, read_json(path)))
    keys, id_of = IDS[task]
    found: set[str] = set()
    for number, record in enumerate(records_of(path, *keys)):
        try:
            found.add(str(id_of(record)))
        except KeyError as error:
            raise AnnotationError(f"{path}, record {number}: the field {error} is missing") from error
    return found
