"""Readers of the benchmark's annotation files: a split becomes columns, one row a sample.

File names and fields are those of the public data of VL-T5, VL-Adapter and VL-PET (``src/*_clip_data.py`` of
HenryHZY/VL-PET). A new task is a row of :data:`READERS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlpet_lightning.tasks import Split, TaskSpec

TREE = """\
{root}/
  vqa/       karpathy_train.json karpathy_val.json karpathy_test.json v2_mscoco_val2014_annotations.json
  GQA/       train.json valid.json testdev.json
  nlvr/      train.json valid.json test.json
  COCO/      dataset_coco.json
  features/  COCO VG GQA nlvr"""

# the official VQA v2 files with ten human answers a question; Karpathy's val and test are parts of val2014
VQA_ANSWER_FILES = ("vqa/v2_mscoco_val2014_annotations.json", "vqa/v2_mscoco_train2014_annotations.json")

# caption_clip_data.py, split_rename
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


class AnnotationError(ValueError):
    """An annotation file that cannot be used; says which file, which record and what is wrong."""


class Row(NamedTuple):
    """One sample as a reader hands it over.

    Args:
        id: Question id, unique within task and split.
        text: Input without the prompt.
        images: Image ids.
        label: Answer to score; empty where nothing is to be learnt.
        reference: What the task's metric compares a prediction with; see :class:`vlpet_lightning.Batch`.
    """

    id: str
    text: str
    images: tuple[str, ...]
    label: dict[str, float]
    reference: dict[str, Any]


@dataclass
class Samples:
    """The samples of one split as columns of ``n`` rows.

    Args:
        ids: ``n`` question ids.
        texts: ``n`` inputs without the prompt.
        images: ``n`` tuples of image ids.
        answers: The answers of all samples, one sample after the other.
        scores: The score of each answer.
        offsets: ``(n + 1,)``: the answers of row ``i`` are ``offsets[i]`` to ``offsets[i + 1]``.
        references: ``n`` references; empty for a training split.
    """

    ids: list[str]
    texts: list[str]
    images: list[tuple[str, ...]]
    answers: list[str]
    scores: np.ndarray
    offsets: np.ndarray
    references: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Reader:
    """How a task's records become rows.

    Args:
        rows: ``rows(record, split)`` gives the rows of one record, none where it belongs to another split.
        key: The key of the list of records in a file; None where the file is that list.
        complete: ``complete(root, samples)`` adds to the references of an evaluation split what lies in other files.
    """

    rows: Callable[[dict[str, Any], str], Iterable[Row]]
    key: str | None = None
    complete: Callable[[Path, Samples], None] | None = None


def read_split(root: str | Path, task: TaskSpec, split: str, limit: int | None = None) -> Samples:
    """Read one split of a task.

    Args:
        root: The data root.
        task: A row of :data:`vlpet_lightning.tasks.TASKS`.
        split: ``train``, ``val`` or ``test``.
        limit: Only the first rows; None reads all.

    Raises:
        FileNotFoundError: If a file is missing; says which commands bring it.
        AnnotationError: If a file is malformed, a record lacks a field, an id comes twice or no sample is left.
    """
    if task.name not in READERS:
        raise ValueError(f"no reader for the task {task.name!r}: choose from {', '.join(sorted(READERS))}")
    reader = READERS[task.name]
    paths = [find_file(root, name) for name in task.splits[split].annotations]  # all of them, before reading any
    rows = islice((row for path in paths for row in _rows(path, reader, split)), limit)
    samples = _columns(rows, keep_references=split != "train")
    if not samples.ids:
        raise AnnotationError(f"the {split} split of {task.name} is empty: {', '.join(map(str, paths))}")
    _check_unique(samples.ids, task.name, task.splits[split])
    if reader.complete is not None and split != "train":
        reader.complete(Path(root), samples)
    return samples


def find_file(root: str | Path, name: str) -> Path:
    """The path of an annotation file below the data root, or below its folder ``annotations``.

    Raises:
        FileNotFoundError: If it is in neither; shows the expected tree and the commands that bring it.
    """
    for folder in (Path(root), Path(root) / "annotations"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"no annotation file {name} below {root} (nor below {Path(root) / 'annotations'}). Expected:\n"
        f"{TREE.format(root=root)}\n"
        "A small synthetic world: python -m vlpet_lightning data synthetic --out DIR\n"
        "The benchmark's annotations: hf download ylsung/VL-Adapter-datasets --repo-type dataset --local-dir DIR\n"
        "Features of its images: python -m vlpet_lightning data extract --images IMAGES --out DIR/features/COCO\n"
        "Then set data.init_args.root to DIR."
    )


def load_json(path: Path, key: str | None = None) -> list[dict[str, Any]]:
    """The list of records in a JSON file.

    Args:
        path: The file.
        key: Where the list is; None: at the top.

    Raises:
        AnnotationError: If the file is no JSON or has no such list.
    """
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{path} is not valid JSON ({error}): it may be cut short, fetch it again") from error
    records = content if key is None else content.get(key) if isinstance(content, dict) else None
    if not isinstance(records, list):
        where = "at its top" if key is None else f"under {key!r}"
        raise AnnotationError(f"{path} has no list of records {where}")
    return records


def _rows(path: Path, reader: Reader, split: str) -> Iterator[Row]:
    for number, record in enumerate(load_json(path, reader.key)):
        try:
            yield from reader.rows(record, split)
        except KeyError as error:
            raise AnnotationError(f"{path}, record {number}: the field {error} is missing") from error
        except (TypeError, AttributeError, ValueError) as error:
            raise AnnotationError(f"{path}, record {number}: {error}") from error


def _columns(rows: Iterable[Row], keep_references: bool) -> Samples:
    samples = Samples([], [], [], [], np.empty(0), np.empty(0))
    scores: list[float] = []
    ends = [0]
    shared: dict[Any, Any] = {}  # a million rows repeat few answers and images: keep one of each
    for row in rows:
        samples.ids.append(row.id)
        samples.texts.append(row.text)
        samples.images.append(shared.setdefault(row.images, row.images))
        samples.answers.extend(shared.setdefault(answer, answer) for answer in row.label)
        scores.extend(row.label.values())
        ends.append(len(scores))
        if keep_references:
            samples.references.append(row.reference)
    samples.scores = np.asarray(scores, dtype=np.float32)
    samples.offsets = np.asarray(ends, dtype=np.int64)
    return samples


def _check_unique(ids: list[str], task: str, split: Split) -> None:
    seen: set[str] = set()
    if len(set(ids)) == len(ids):
        return
    twice = sorted({id for id in ids if id in seen or seen.add(id)})  # type: ignore[func-returns-value]
    raise AnnotationError(
        f"{len(twice)} question ids of {task} come twice in {', '.join(split.annotations)}: {', '.join(twice[:5])}"
    )


def _scores(label: Any) -> dict[str, float]:
    if not isinstance(label, dict) or not all(0 <= score < float("inf") for score in label.values()):
        raise ValueError(f"label must map answers to scores of 0 or more, got {label!r}")
    return label


def _vqa_rows(record: dict[str, Any], split: str) -> Iterator[Row]:
    label = _scores(record["label"])
    text = record["sent"] if "sent" in record else record["question"]
    kinds = {name: record.get(name, "") for name in ("answer_type", "question_type")}
    yield Row(str(record["question_id"]), text, (record["img_id"],), label, {"answers": [], "label": label, **kinds})


def _gqa_rows(record: dict[str, Any], split: str) -> Iterator[Row]:
    label = _scores(record["label"])
    yield Row(str(record["question_id"]), record["sent"], (str(record["img_id"]),), label, {"label": label})


def _nlvr2_rows(record: dict[str, Any], split: str) -> Iterator[Row]:
    if record["label"] not in (0, 1):
        raise ValueError(f"label must be 0 or 1, got {record['label']!r}")
    truth = "true" if record["label"] == 1 else "false"
    reference = {"label": truth, "identifier": record["identifier"]}
    yield Row(str(record["uid"]), record["sent"], (record["img0"], record["img1"]), {truth: 1.0}, reference)


def _caption_rows(record: dict[str, Any], split: str) -> Iterator[Row]:
    if record["split"] not in KARPATHY_SPLITS:
        raise ValueError(f"split must be one of {', '.join(KARPATHY_SPLITS)}, got {record['split']!r}")
    if KARPATHY_SPLITS[record["split"]] != split:
        return
    image = record["filename"].split(".")[0]
    captions = [sentence["raw"].strip() for sentence in record["sentences"]]
    if split != "train":
        yield Row(image, "", (image,), {}, {"captions": captions})
        return
    for number, caption in enumerate(captions):
        yield Row(f"{image}#{number}", "", (image,), {caption: 1.0}, {})


def _add_human_answers(root: Path, samples: Samples) -> None:
    wanted = dict(zip(samples.ids, samples.references, strict=True))
    for name in VQA_ANSWER_FILES:
        if not wanted:
            return
        path = find_file(root, name)
        for number, record in enumerate(load_json(path, "annotations")):
            try:
                reference = wanted.pop(str(record["question_id"]), None)
                if reference is not None:
                    _fill_reference(reference, record)
            except (KeyError, TypeError) as error:
                raise AnnotationError(f"{path}, record {number}: the field {error} is missing") from error
    if wanted:
        raise AnnotationError(
            f"{len(wanted)} VQA questions have no human answers in {' and '.join(VQA_ANSWER_FILES)}: "
            f"{', '.join(list(wanted)[:5])}"
        )


def _fill_reference(reference: dict[str, Any], record: dict[str, Any]) -> None:
    reference["answers"] = [answer["answer"] for answer in record["answers"]]
    for name in ("answer_type", "question_type"):
        reference[name] = record.get(name, reference[name])


READERS: dict[str, Reader] = {
    "vqa": Reader(_vqa_rows, complete=_add_human_answers),
    "gqa": Reader(_gqa_rows),
    "nlvr2": Reader(_nlvr2_rows),
    "caption": Reader(_caption_rows, key="images"),
}
