"""References of a task from annotation files: the benchmark's processed files and the official ones.

A reference is a mapping as in :class:`vlpet_lightning.Batch`, with the fields that the official breakdowns need:
``answer_type`` and ``question_type`` (VQA), ``show`` (TVQA), or a question of the official file (GQA).
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from sys import intern
from typing import Any

from data_modules.annotations.image_text import KARPATHY_SPLITS
from data_modules.annotations.json_records import open_binary, read_lines, read_records
from data_modules.annotations.records import AnnotationError

Reference = dict[str, Any]
PEEK = 1 << 16  # bytes that decide a file's shape
CHOICES = {"tvqa": 5, "how2qa": 4}


@dataclass
class Truths:
    """References of the questions to score.

    Args:
        references: Reference of each id, in file order.
        aliases: Other ids of some questions (``uid`` of NLVR2's processed files), which a prediction file may use.
        official: Whether they come from official files, which breakdowns need.
    """

    references: dict[str, Reference] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    official: bool = False

    def add(self, id: str, reference: Reference, path: Path) -> None:
        """Add a question.

        Raises:
            AnnotationError: If there is one with this id.
        """
        if id in self.references:
            raise AnnotationError(f"{path}: the id {id} comes twice")
        self.references[id] = reference


def read_truths(task: str, paths: Sequence[Path], split: str = "test") -> Truths:
    """Read the references of a task.

    Args:
        task: Name of a task.
        paths: Annotation files; each may be compressed (``.gz``).
        split: Split to score, for files with several splits (``dataset_coco.json``).

    Raises:
        FileNotFoundError: If a file does not exist.
        AnnotationError: If a file is malformed or has no reference of this task.
    """
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"--annotations: there is no file {path}")
    found = TRUTHS[task](paths, split)
    if not found.references:
        raise AnnotationError(f"no reference of {task} (split {split}) in {', '.join(map(str, paths))}")
    return found


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, which may be compressed.

    Raises:
        AnnotationError: If it is not valid JSON.
    """
    try:
        with open_binary(path) as file:
            return json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError, EOFError, OSError) as error:
        raise AnnotationError(f"{path} is not valid JSON ({error}): it may be cut short, fetch it again") from error


def _has_lines(path: Path) -> bool:
    """Whether a file has one JSON object per line."""
    start = _start(path)
    first, newline, _ = start.lstrip().partition(b"\n")
    try:
        return isinstance(json.loads(first), dict) and bool(newline)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False


def starts_with(path: Path, character: bytes) -> bool:
    """Whether the first character of a file, after white space, is this one."""
    return _start(path).lstrip()[:1] == character


def _start(path: Path) -> bytes:
    try:
        with open_binary(path) as file:
            return file.read(PEEK)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise AnnotationError(f"{path} is not a complete gzip file ({error}): fetch it again") from error


def records_of(path: Path, *keys: str) -> Iterator[Reference]:
    """Yield the records of a JSON list, of a list under one of several keys of an object, or of JSON lines.

    Raises:
        AnnotationError: If the file has no such records.
    """
    if starts_with(path, b"["):
        return read_records(path)
    if ".jsonl" in path.suffixes or _has_lines(path):
        return read_lines(path)
    for key in keys:
        try:
            next(iter(islice(read_records(path, key), 1)), None)
        except AnnotationError as error:
            if "has no list of records" not in str(error):
                raise
        else:
            return read_records(path, key)
    raise AnnotationError(f"{path} has no list of records, neither at its top nor under {' or '.join(map(repr, keys))}")


def _from(paths: Sequence[Path], keys: Iterable[str], read: Callable[[Reference, Path], None]) -> None:
    for path in paths:
        for number, record in enumerate(records_of(path, *keys)):
            try:
                read(record, path)
            except (KeyError, TypeError, AttributeError) as error:
                reason = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
                raise AnnotationError(f"{path}, record {number}: {reason}") from error


def _vqa(paths: Sequence[Path], split: str) -> Truths:
    """Read human answers of official files, restricted to the questions of a processed file if one is given."""
    truths, labels = Truths(), dict[str, Reference]()
    seen: dict[str, Reference] = {}

    def read(record: Reference, path: Path) -> None:
        id = str(record["question_id"])
        if "answers" in record:
            if id in seen:
                raise AnnotationError(f"{path}: the id {id} comes twice")
            seen[id] = {
                "answers": [intern(answer["answer"]) for answer in record["answers"]],  # equal answers are one object
                "answer_type": record.get("answer_type", ""),
                "question_type": record.get("question_type", ""),
            }
        else:
            labels[id] = {"label": record["label"]}

    _from(paths, ("annotations",), read)
    truths.official = bool(seen)
    if not labels or not seen:
        truths.references = seen or labels
        return truths
    lacking = labels.keys() - seen.keys()
    if lacking:
        raise AnnotationError(
            f"{len(lacking)} of {len(labels)} questions have no human answers in {', '.join(map(str, paths))}: "
            f"{', '.join(sorted(lacking)[:5])}. Give the official annotations of their split, too"
        )
    truths.references = {id: seen[id] | label for id, label in labels.items()}
    return truths


def _gqa(paths: Sequence[Path], split: str) -> Truths:
    truths = Truths()
    for path in paths:
        if starts_with(path, b"["):  # processed

            def read(record: Reference, path: Path) -> None:
                truths.add(str(record["question_id"]), {"label": record["label"]}, path)

            _from([path], (), read)
            continue
        for id, question in read_json(path).items():
            if not isinstance(question, dict) or "answer" not in question:
                raise AnnotationError(f"{path}: question {id} has no 'answer': give a split whose answers are public")
            truths.add(str(id), question, path)
        truths.official = True
    if truths.official and any("label" in reference for reference in truths.references.values()):
        raise AnnotationError("--annotations: give either GQA's official question files or the processed ones")
    return truths


def _nlvr2(paths: Sequence[Path], split: str) -> Truths:
    truths = Truths()

    def read(record: Reference, path: Path) -> None:
        label = record["label"]
        words = {0: "false", 1: "true", "False": "false", "True": "true", "false": "false", "true": "true"}
        if label not in words:
            raise TypeError(f"label must be True or False, is {label!r}")
        identifier = str(record["identifier"])
        truths.add(identifier, {"label": words[label], "identifier": identifier}, path)
        if "uid" in record:
            truths.aliases[str(record["uid"])] = identifier
        else:
            truths.official = True

    _from(paths, (), read)
    return truths


def image_keys(names: Iterable[str]) -> dict[str, str]:
    """Return the key of each image name: its number as COCO's servers use it, or the name if numbers repeat.

    >>> image_keys(["COCO_val2014_000000391895", "COCO_val2014_000000000042"])
    {'COCO_val2014_000000391895': '391895', 'COCO_val2014_000000000042': '42'}
    >>> image_keys(["a_1", "b_1"])
    {'a_1': 'a_1', 'b_1': 'b_1'}
    """
    names = list(names)
    numbers = [re.search(r"\d+$", name) for name in names]
    keys = [str(int(number[0])) if number else name for name, number in zip(names, numbers, strict=True)]
    return dict(zip(names, keys if len(set(keys)) == len(set(names)) else names, strict=True))


def _caption(paths: Sequence[Path], split: str) -> Truths:
    found: dict[str, list[str]] = {}

    def read(record: Reference, path: Path) -> None:
        if "sentences" not in record:  # official: one record per caption
            found.setdefault(str(record["image_id"]), []).append(record["caption"])
        elif KARPATHY_SPLITS.get(record["split"], record["split"]) == split:
            name = record["filename"].split(".")[0]
            found[name] = [sentence["raw"].strip() for sentence in record["sentences"]]

    for path in paths:
        keys = ("annotations",) if _is_official_captions(path) else ("images",)
        _from([path], keys, read)
    keys_of = image_keys(found)
    return Truths({keys_of[name]: {"captions": captions} for name, captions in found.items()})


def _is_official_captions(path: Path) -> bool:
    first = next(iter(records_of(path, "images", "annotations")), {})
    return "sentences" not in first


def _choice(task: str) -> Callable[[Sequence[Path], str], Truths]:
    def read_task(paths: Sequence[Path], split: str) -> Truths:
        truths, count = Truths(official=True), CHOICES[task]

        def add(id: str, right: Any, show: str, path: Path) -> None:
            if right not in range(count):
                raise TypeError(f"answer_idx must be one of 0 to {count - 1}, is {right!r}")
            truths.add(id, {"label": f"a{right}", "choices": count, "show": show}, path)

        def read(record: Reference, path: Path) -> None:
            if "answer_idx" in record:  # only an evaluation server has the others
                add(str(record["qid"]), record["answer_idx"], record.get("show_name", ""), path)

        for path in paths:
            if ".jsonl" not in path.suffixes and not _has_lines(path) and starts_with(path, b"{"):
                for show, answers in read_json(path).get("solution", {}).items():  # VALUE's file of right answers
                    for id, right in answers.items():
                        add(str(id), right, show, path)
            else:
                _from([path], (), read)
        return truths

    return read_task


def _clips(paths: Sequence[Path], split: str) -> Truths:
    truths = Truths(official=True)

    def read(record: Reference, path: Path) -> None:
        if record.get("descs"):
            descriptions = {str(entry.get("desc_id", n)): entry["desc"] for n, entry in enumerate(record["descs"])}
            captions = list(descriptions.values())
            truths.add(str(record["clip_id"]), {"captions": captions, "descriptions": descriptions}, path)

    _from(paths, (), read)
    return truths


TRUTHS: dict[str, Callable[[Sequence[Path], str], Truths]] = {
    "vqa": _vqa,
    "gqa": _gqa,
    "nlvr2": _nlvr2,
    "caption": _caption,
    "tvqa": _choice("tvqa"),
    "how2qa": _choice("how2qa"),
    "tvc": _clips,
    "yc2c": _clips,
}
