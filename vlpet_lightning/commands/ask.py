"""The ``ask`` command: answer questions about image files."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from vlpet_lightning.answers import Answer
from vlpet_lightning.atomic_file import atomic_write
from vlpet_lightning.commands.export import export
from vlpet_lightning.interop.export.record import read_record
from vlpet_lightning.predictor import BATCH, Predictor, default_task
from vlpet_lightning.tasks import IMAGE_TEXT

COLUMNS = ("image", "image2", "question")


@dataclass(frozen=True)
class Question:
    """A question about one or two image files."""

    images: tuple[Path, ...]
    text: str


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    found = argparse.ArgumentParser(
        prog="python -m vlpet_lightning ask",
        description="Answer questions about image files. Images are encoded as the features of the training data were.",
        epilog='Example: ask --model DIR --image photo.jpg "What is on the table?" --top 5',
        allow_abbrev=False,
    )
    found.add_argument("question", nargs="?", default="", help="question or statement; none for a caption")
    found.add_argument(
        "--model", required=True, type=Path, metavar="DIR", help="folder written by export, or a checkpoint of fit"
    )
    found.add_argument(
        "--image", action="append", type=Path, default=[], metavar="FILE", help="image; give two for nlvr2"
    )
    found.add_argument("--task", choices=IMAGE_TEXT, help="task; by default from the number of images and the question")
    found.add_argument("--top", type=int, default=1, metavar="N", help="number of answers, with their probabilities")
    found.add_argument("--json", action="store_true", help="print JSON")
    found.add_argument("--images", type=Path, metavar="DIR", help="folder of images, with --questions")
    found.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="CSV file with columns image, question and, for nlvr2, image2",
    )
    found.add_argument("--out", type=Path, metavar="FILE", help="write the answers to a .csv or .json file")
    found.add_argument("--backbone", metavar="NAME", help="folder or hub name of the language model")
    found.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    found.add_argument("--store", type=Path, metavar="DIR", help="feature store of the training data")
    found.add_argument("--encoder_weights", metavar="FILE", help="weights of the image encoder, if they were a file")
    found.add_argument("--architecture", metavar="FILE", help="architecture of the image encoder, if it was a file")
    return found


def read_questions(path: Path, folder: Path) -> list[Question]:
    """Read a CSV file of questions.

    Args:
        path: File with the columns ``image``, ``question`` and, optionally, ``image2``.
        folder: Folder of the images.

    Raises:
        FileNotFoundError: If the file, or images that it names, are missing; lists them.
        ValueError: If a column is missing, a row has no image, there is no row, or the file is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--questions: there is no file {path}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}): save it in that encoding") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    lacking = {"image", "question"} - set(reader.fieldnames or ())
    if lacking:
        raise ValueError(
            f"{path} has no column {' and '.join(sorted(lacking))}: its first line must name image, question and, "
            f"for two images, image2; it reads {', '.join(reader.fieldnames or ()) or 'nothing'}"
        )
    rows = list(reader)
    without = [number for number, row in enumerate(rows, start=1) if not row["image"]]
    if without:
        raise ValueError(f"{path}: question {without[0]} has no image, fill in its column image")
    names = [[row["image"], *([row["image2"]] if row.get("image2") else [])] for row in rows]
    questions = [
        Question(tuple(folder / name for name in some), row["question"] or "")
        for row, some in zip(rows, names, strict=True)
    ]
    if not questions:
        raise ValueError(f"{path} has no question")
    missing = sorted({str(image) for question in questions for image in question.images if not image.is_file()})
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise FileNotFoundError(f"{len(missing)} images of {path} are missing: {', '.join(missing[:5])}{more}")
    return questions


def _questions(known: argparse.Namespace) -> list[Question]:
    if known.questions is not None:
        if known.image or known.question:
            raise ValueError("--questions has the images and questions: give no --image and no question beside it")
        return read_questions(known.questions, known.images or Path())
    if not known.image:
        raise ValueError("give --image FILE, or --questions FILE with --images DIR")
    missing = [str(path) for path in known.image if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"there is no image {', '.join(missing)}")
    return [Question(tuple(known.image), known.question)]


def _predictor(known: argparse.Namespace) -> Predictor:
    settings = {name: getattr(known, name) for name in ("device", "store", "encoder_weights", "architecture")}
    if known.model.suffix != ".ckpt":
        return Predictor(known.model, known.backbone, **settings)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [] if known.backbone is None else ["--model.init_args.backbone", known.backbone]
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            export(["--ckpt_path", str(known.model), "--out", f"{folder}/export", *overrides])
        if known.store is None and not read_record(f"{folder}/export").get("features"):
            raise ValueError(
                f"the feature stores that the run of {known.model} was trained on are not where its config says: give "
                "one of them by --store"
            )
        return Predictor(f"{folder}/export", known.backbone, **settings)


def answered(predictor: Predictor, questions: Sequence[Question], task: str | None, top: int) -> list[list[Answer]]:
    """Answer questions in batches of the same task, with a progress bar if there are many.

    Raises:
        ValueError: If a question does not fit its task; nothing is computed then.
    """
    kinds = [task or default_task(len(question.images), question.text) for question in questions]
    found: list[list[Answer]] = [[] for _ in questions]
    order = sorted(range(len(questions)), key=lambda number: (kinds[number], questions[number].images))
    truncated: list[tuple[str, int | None]] = []
    for kind in dict.fromkeys(kinds):
        some = [question for question, other in zip(questions, kinds, strict=True) if other == kind]
        texts = [question.text for question in some]
        spec = predictor.task([question.images for question in some], texts, kind)
        truncated += [(texts[number], spec.max_text) for number in predictor.truncated(spec, texts)]
    if truncated:
        Console(stderr=True).print(
            f"{len(truncated)} question(s) are truncated to {truncated[0][1]} tokens with the prompt, as in training: "
            f"{escape(truncated[0][0])}",
            style="yellow",
            soft_wrap=True,
        )
    starts = [0]
    for place in range(1, len(order)):  # a batch ends where it is full, or another task begins
        if place - starts[-1] == BATCH or kinds[order[place]] != kinds[order[place - 1]]:
            starts.append(place)
    for start, end in track(
        list(zip(starts, [*starts[1:], len(order)], strict=True)),
        description="answering",
        console=Console(stderr=True),
        transient=True,
        disable=len(questions) <= BATCH,
    ):
        rows = order[start:end]
        images = [questions[row].images for row in rows]
        answers = predictor(images, [questions[row].text for row in rows], kinds[rows[0]], top=top)
        for row, best in zip(rows, answers, strict=True):
            found[row] = best
    return found


def as_plain(questions: Sequence[Question], answers: Sequence[Sequence[Answer]]) -> list[dict[str, Any]]:
    """Return questions and answers as plain data."""
    return [
        {
            "images": [str(image) for image in question.images],
            "question": question.text,
            "answers": [answer._asdict() for answer in some],
        }
        for question, some in zip(questions, answers, strict=True)
    ]


def _write(path: Path, found: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        if path.suffix == ".json":
            file.write((json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode())
            return
        rows = [
            [*(entry["images"] + [""])[:2], entry["question"], rank, answer["text"], f"{answer['probability']:.6g}"]
            for entry in found
            for rank, answer in enumerate(entry["answers"], start=1)
        ]
        text = io.StringIO(newline="")
        csv.writer(text).writerows([[*COLUMNS, "rank", "answer", "probability"], *rows])
        file.write(text.getvalue().encode())


def _print(found: list[dict[str, Any]]) -> None:
    table = Table()
    for name in ("image", "question", "answer"):
        table.add_column(name, overflow="fold")
    table.add_column("probability", justify="right")
    for entry in found:
        for rank, answer in enumerate(entry["answers"]):
            names = ", ".join(Path(image).name for image in entry["images"])
            first = (names, entry["question"]) if rank == 0 else ("", "")
            table.add_row(*map(escape, (*first, answer["text"], f"{answer['probability']:.3f}")))
    Console().print(table)


def ask(args: Sequence[str]) -> None:
    """Answer questions about image files.

    Args:
        args: The command's options; see ``--help``.

    Raises:
        FileNotFoundError: If an image, the model or a file of the encoder is missing.
        ValueError: If the options contradict each other, or the features are of another extractor than the model was
            trained on.
    """
    known = parser().parse_args(args)
    questions = _questions(known)
    if known.out is not None and known.out.suffix not in (".csv", ".json"):
        raise ValueError(f"--out must end in .csv or .json, got {known.out}")
    if known.top < 1:
        raise ValueError(f"--top must be 1 or more, got {known.top}")
    found = as_plain(questions, answered(_predictor(known), questions, known.task, known.top))
    if known.out is not None:
        _write(known.out, found)
        Console(stderr=True).print(f"written: {known.out}", soft_wrap=True)
    elif known.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))  # noqa: T201  # machine-readable
    else:
        _print(found)
