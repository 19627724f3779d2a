"""``submission check`` and ``submission pack``: result files for the evaluation servers."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from rich.console import Console
from rich.table import Table

from data_modules.scoring.answers import listed
from data_modules.scoring.questions import question_ids
from data_modules.scoring.truths import CHOICES
from vlpet_lightning.atomic_file import atomic_write
from vlpet_lightning.prediction_files import read_bytes
from vlpet_lightning.submissions import FORMATS, SubmissionError
from vlpet_lightning.submissions.servers import SERVERS, VALUE_TASKS

TEST_STAGES = ("predict", "test")  # prefixes of result files of a test split, in order of preference


@dataclass(frozen=True)
class Member:
    """Result file of one split: a file of its own, or a member of a zip archive."""

    name: str
    split: str | None
    content: bytes


def check_parser() -> argparse.ArgumentParser:
    """Return the parser of ``submission check``."""
    found = argparse.ArgumentParser(
        prog="python -m vlpet_lightning submission check",
        description="Check a result file before it is uploaded to an evaluation server: names, format, types, repeated "
        "and empty answers, and whether every question is answered.",
        allow_abbrev=False,
    )
    found.add_argument("file", type=Path, metavar="FILE", help="result file, or the zip archive that the server wants")
    found.add_argument("--task", required=True, choices=tuple(SERVERS), help="task of the file")
    found.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="question file of the split, whose ids the answers are compared with; otherwise only numbers are compared",
    )
    found.add_argument(
        "--split", help="split of the file, if its name does not say: test2015 (VQA), test1 (NLVR2), val (VALUE), ..."
    )
    return found


def check_command(args: Sequence[str]) -> None:
    """Run ``submission check``; see :func:`check`."""
    known = check_parser().parse_args(args)
    check(known.file, known.task, known.questions, known.split)


def check(file: Path, task: str, questions: Path | None = None, split: str | None = None) -> None:
    """Check a result file before it is uploaded to an evaluation server.

    Checks the names, the format and the types, repeated and empty answers, and whether every question is answered.

    Args:
        file: Result file, or the zip archive that the server wants.
        task: Task of the file.
        questions: Question file of the split: answers are compared with its ids. Without it, only their number is
            compared.
        split: Split of the file, if it is not in its name: test2015 (VQA), test1 (NLVR2), val (VALUE), ... For an
            archive, the split of ``questions``.

    Raises:
        FileNotFoundError: If a file does not exist.
        SubmissionError: If the server would refuse the file; lists all problems.
        ValueError: If the task or the split is unknown.
    """
    if task not in SERVERS:
        raise ValueError(f"unknown task {task!r}: choose from {', '.join(SERVERS)}")
    server = SERVERS[task]
    if split is not None and split not in server.splits:
        raise ValueError(f"unknown split {split!r} of {task}: choose from {', '.join(server.splits)}")
    expected = None if questions is None else question_ids(task, questions)
    if expected is not None and split is None and file.suffix == ".zip":
        raise ValueError(f"--questions is of one split, and an archive has {' and '.join(server.archive)}: add --split")
    members = _members(file, task, split)
    problems, rows = [], []
    for member in members:
        answers = FORMATS[task].read(member.content, member.name)
        known = server.splits.get(member.split or "")
        wanted = expected if split in (None, member.split) else None
        problems += [f"{member.name}: {problem}" for problem in _problems(task, answers, wanted, known)]
        rows.append((member.name, member.split or "", f"{len(answers):,}", _completeness(wanted, known)))
    if problems:
        raise SubmissionError(f"{file} is not ready for {server.name}:\n" + "\n".join(f"- {line}" for line in problems))
    _print(file, task, rows)


def _print(file: Path, task: str, rows: list[tuple[str, str, str, str]]) -> None:
    server = SERVERS[task]
    table = Table("file", "split", "answers", "completeness", title=f"{task}: no problem found; server: {server.name}")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"{file.stat().st_size / 1e6:.1f} MB. Limits: {server.limits}", soft_wrap=True, highlight=False)


def _completeness(expected: Set[str] | None, known: int | None) -> str:
    if expected is not None:
        return "every question is answered"
    return "not checked: give --questions" if known is None else "right number (ids not checked: give --questions)"


def _members(file: Path, task: str, split: str | None) -> list[Member]:
    """Return the result files of the task, with the split that their names state."""
    archive = SERVERS[task].archive
    if file.suffix == ".zip":
        if not archive:
            raise SubmissionError(f"{file}: the server of {task} wants the {FORMATS[task].suffix} file itself, no zip")
        return list(_unpacked(file, task))
    content = read_bytes(file)
    name = file.name.removesuffix(".gz")
    if not name.endswith(f".{FORMATS[task].suffix}"):
        raise SubmissionError(f"{file}: the suffix for {task} is .{FORMATS[task].suffix}")
    return [Member(file.name, split or _split_of(name, archive), content)]


def _pattern(name: str) -> str:
    return re.escape(name).replace(re.escape("{name}"), "[^/]+")


def _split_of(name: str, archive: dict[str, str]) -> str | None:
    return next((s for s, want in archive.items() if re.fullmatch(_pattern(PurePosixPath(want).name), name)), None)


def _unpacked(file: Path, task: str) -> Iterator[Member]:
    archive = SERVERS[task].archive
    try:
        with zipfile.ZipFile(file) as opened:
            names = [name for name in opened.namelist() if not name.endswith("/")]
            for split, want in archive.items():
                found = [name for name in names if re.fullmatch(_pattern(want), name)]
                if len(found) != 1:
                    raise SubmissionError(
                        f"{file} must have one file {want.format(name='NAME')}, without an enclosing folder; it has: "
                        f"{', '.join(names[:8]) or 'no files'}"
                    )
                yield Member(found[0], split, opened.read(found[0]))
    except zipfile.BadZipFile as error:
        raise SubmissionError(f"{file} is not a complete zip archive ({error}): pack it again") from error


def _problems(task: str, answers: list[tuple[str, str]], expected: Set[str] | None, known: int | None) -> Iterator[str]:
    ids = Counter(id for id, _ in answers)
    repeated = [id for id, count in ids.items() if count > 1]
    if repeated:
        yield listed("ids that come more than once", repeated)
    if expected is not None:
        missing, unknown = expected - ids.keys(), ids.keys() - expected
        if missing:
            yield listed("questions without an answer", missing)
        if unknown:
            yield listed("answers to unknown questions", unknown)
    elif known is not None and len(ids) != known:
        yield f"{len(ids):,} answers, and the split has {known:,} questions"
    elif not ids:
        yield "no answer"
    empty = [id for id, text in answers if not text.strip()]
    if empty:
        yield listed("empty answers (for a choice: a number below 0)", empty)
    if task in CHOICES:
        wrong = [id for id, text in answers if text and int(text[1:]) >= CHOICES[task]]
        if wrong:
            yield listed(f"answers that are none of the {CHOICES[task]} choices", wrong)


def pack(
    folders: list[Path] | Path, out: Path, benchmark: Literal["value", "caption"] = "value", name: str = "vlpet"
) -> None:
    """Pack result files into the zip archive that VALUE's or COCO's server wants.

    Args:
        folders: Folder or folders with ``val_TASK_submission`` and ``predict_TASK_submission`` (or
            ``test_TASK_submission``) files, as ``validate``, ``predict`` and ``test`` write them into a run's folder
            ``predictions``.
        out: Archive to write.
        benchmark: ``value`` packs all of TVQA, How2QA, TVC and YC2C that are there; ``caption`` packs COCO captions.
        name: Name of the method in COCO's file names.

    Raises:
        FileNotFoundError: If a split of a task is missing, or there is no task at all.
        ValueError: If ``out`` does not end in .zip.
    """
    folders = [folders] if isinstance(folders, Path) else folders
    if out.suffix != ".zip":
        raise ValueError(f"--out must end in .zip, got {out}")
    found = {task: _results(task, folders) for task in (VALUE_TASKS if benchmark == "value" else ("caption",))}
    found = {task: files for task, files in found.items() if files}
    if not found:
        raise FileNotFoundError(
            f"no result files of {benchmark} in {', '.join(map(str, folders))}: run `validate` and `predict` first"
        )
    lacking = [f"{task} {split}" for task, files in found.items() for split in SERVERS[task].archive.keys() - files]
    if lacking:
        raise FileNotFoundError(
            f"the server wants both splits of each task, and these are missing in {', '.join(map(str, folders))}: "
            f"{', '.join(sorted(lacking))}. Run `validate` and `predict` first"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for task, files in found.items():
            for split, path in files.items():
                archive.write(path, SERVERS[task].archive[split].format(name=name))
    console = Console()
    for task in found:
        console.print(f"packed {task}: {', '.join(found[task])}", highlight=False)
    console.print(f"written: {out}. Check it with `submission check {out} --task {next(iter(found))}`")


def _results(task: str, folders: list[Path]) -> dict[str, Path]:
    """Return the result files of a task by the server's name of their split."""
    suffix = FORMATS[task].suffix
    stages = {split: ("val",) if split.startswith("val") else TEST_STAGES for split in SERVERS[task].archive}
    paths = {
        split: [folder / f"{stage}_{task}_submission.{suffix}" for stage in names for folder in folders]
        for split, names in stages.items()
    }
    found = {split: next((path for path in some if path.is_file()), None) for split, some in paths.items()}
    return {split: path for split, path in found.items() if path is not None}
