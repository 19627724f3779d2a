"""Questions of an evaluation server's split, which have no public answers, from the benchmarks' own question files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_modules.annotations.image_text import to_samples
from data_modules.annotations.json_records import open_binary
from data_modules.annotations.records import AnnotationError, Row, Samples


def _vqa(content: Any) -> Iterator[Row]:
    split = content["data_subtype"].replace("-dev", "")  # test-dev2015 is a part of test2015
    for record in content["questions"]:
        image = f"COCO_{split}_{int(record['image_id']):012d}"
        yield Row(str(record["question_id"]), record["question"], (image,), {}, {})


def _gqa(content: Any) -> Iterator[Row]:
    for id, record in content.items():
        yield Row(str(id), record["question"], (str(record["imageId"]),), {}, {})


def _nlvr2(content: Any) -> Iterator[Row]:
    for record in content:
        pair = record["identifier"].rpartition("-")[0]  # the images' names in VL-T5's features
        yield Row(record["identifier"], record["sentence"], (f"{pair}-img0", f"{pair}-img1"), {}, {})


def _caption(content: Any) -> Iterator[Row]:
    for record in content["images"]:
        image = Path(record["file_name"]).stem
        yield Row(image, "", (image,), {}, {})


QUESTIONS: dict[str, Callable[[Any], Iterator[Row]]] = {
    "vqa": _vqa,
    "gqa": _gqa,
    "nlvr2": _nlvr2,
    "caption": _caption,
}


def check_question_tasks(names: dict[str, str]) -> None:
    """Check that a question file can be given for these tasks.

    Raises:
        ValueError: If not; VALUE's test files are part of the benchmark.
    """
    unknown = sorted(names.keys() - QUESTIONS.keys())
    if unknown:
        raise ValueError(
            f"predict_questions: no question files of {', '.join(unknown)} are known: give those of "
            f"{', '.join(QUESTIONS)}; the test files of the other tasks are the server's"
        )


def read_questions(task: str, path: str | Path) -> Samples:
    """Read the questions of a server's split: VQA's and GQA's question files, NLVR2's lines, COCO's image_info file.

    Args:
        task: A task of :data:`QUESTIONS`.
        path: The file; it may be compressed (``.gz``).

    Raises:
        FileNotFoundError: If there is no such file.
        AnnotationError: If it is not the task's question file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"predict_questions: there is no file {path}")
    try:
        with open_binary(path) as file:
            content = [json.loads(line) for line in file] if task == "nlvr2" else json.load(file)
        samples = to_samples(QUESTIONS[task](content), keep_references=False)
    except (
        json.JSONDecodeError,
        UnicodeDecodeError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
    ) as error:
        reason = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise AnnotationError(f"{path} is not a question file of {task}: {reason}") from error
    if not samples.ids:
        raise AnnotationError(f"{path} has no question")
    return samples
