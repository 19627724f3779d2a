"""Readers of the benchmark's annotation files, which return a split as columns with one row per sample.

File names and fields are those of the public data of VL-T5, VL-Adapter and VL-PET (``src/*_clip_data.py`` of
HenryHZY/VL-PET). To add a task, add a row to :data:`READERS`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_modules.annotations.column_cache import cached_samples
from data_modules.annotations.columns import CodedBuilder, CodedTuples, StringsBuilder
from data_modules.annotations.json_records import read_records
from data_modules.annotations.records import AnnotationError, Reader, RecordRows, Row, Samples, images_of
from data_modules.annotations.video_text import VIDEO_READERS
from data_modules.store.array_cache import ArrayCache
from vlpet_lightning.tasks import Split, TaskSpec

TREE = """\
{root}/
  vqa/       karpathy_train.json karpathy_val.json karpathy_test.json v2_mscoco_val2014_annotations.json
  GQA/       train.json valid.json testdev.json
  nlvr/      train.json valid.json test.json
  COCO/      dataset_coco.json
  features/  COCO VG GQA nlvr"""

VIDEO_TREE = """\
{root}/
  video/ann/  tv_subtitles.jsonl how2_subtitles.jsonl yc2_subtitles.jsonl
    tvqa/     tvqa_train.jsonl tvqa_val.jsonl tvqa_test_public.jsonl tvqa_test_release.jsonl
    how2qa/   how2qa_train_release.jsonl how2qa_val_release.jsonl how2qa_test_public_release.jsonl
    tvc/      tvc_train_release.jsonl tvc_val_release.jsonl tvc_test_release.jsonl
    yc2c/     yc2c_train_release.jsonl yc2c_val_release.jsonl yc2c_test_release.jsonl
  features/   tv how2 yc2"""

# the official VQA v2 files with ten human answers per question; Karpathy's val and test are subsets of val2014
VQA_ANSWER_FILES = ("vqa/v2_mscoco_val2014_annotations.json", "vqa/v2_mscoco_train2014_annotations.json")

# caption_clip_data.py, split_rename
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def read_split(
    root: str | Path,
    task: TaskSpec,
    split: str,
    limit: int | None = None,
    *,
    by_clip: bool = False,
    cache: ArrayCache | None = None,
) -> Samples:
    """Read one split of a task.

    Args:
        root: The data root.
        task: A row of :data:`vlpet_lightning.tasks.TASKS`.
        split: ``train``, ``val`` or ``test``.
        limit: Maximum number of rows, from the start; None reads all.
        by_clip: Whether to evaluate each clip once with all its references instead of each description separately.
        cache: Cache of large training splits.

    Raises:
        FileNotFoundError: If a file is missing; the message lists the commands that provide it.
        AnnotationError: If a file is malformed, a record lacks a field, an id is duplicated or the split is empty.
    """
    if task.name not in READERS:
        raise ValueError(f"no reader for the task {task.name!r}: choose from {', '.join(sorted(READERS))}")
    reader = READERS[task.name]
    paths = [find_file(root, name) for name in task.splits[split].annotations]  # find all files before reading any
    read = reader.by_clip if by_clip and reader.by_clip is not None and split != "train" else reader.rows

    def from_files() -> Samples:
        rows = islice((row for path in paths for row in _rows(path, reader, read, split)), limit)
        samples = to_samples(rows, keep_references=split != "train")
        if not samples.ids:
            raise AnnotationError(f"the {split} split of {task.name} is empty: {', '.join(map(str, paths))}")
        _check_unique(samples.ids, task.name, task.splits[split])
        return samples

    if cache is None or split != "train":  # evaluation splits have references
        samples = from_files()
    else:
        samples = cached_samples(cache, paths, (task.name, split, limit), from_files)
    if not all(samples.references):  # only an evaluation server has them: there is nothing to score
        samples.references = []
    if reader.complete is not None and split != "train":
        reader.complete(Path(root), samples)
    if task.subtitles is not None:
        samples.subtitles = read_subtitles(find_file(root, task.subtitles), samples)
    return samples


def files_of(task: TaskSpec, split: str) -> list[str]:
    """Return the files that :func:`read_split` reads for a split, with all :data:`VQA_ANSWER_FILES` it may need."""
    answers = VQA_ANSWER_FILES if READERS[task.name].complete is not None and split != "train" else ()
    subtitles = () if task.subtitles is None else (task.subtitles,)
    return [*task.splits[split].annotations, *subtitles, *answers]


def read_subtitles(path: Path, samples: Samples) -> dict[str, str]:
    """Read the subtitles of the samples' clips, joined to one text per clip.

    Raises:
        AnnotationError: If the file is malformed or clips are missing from it.
    """
    wanted = images_of(samples)
    found: dict[str, str] = {}
    for number, record in enumerate(read_records(path)):
        try:
            if str(record["vid_name"]) in wanted:
                found[str(record["vid_name"])] = " ".join(line["text"].strip() for line in record["sub"])
        except (KeyError, TypeError, AttributeError) as error:
            raise AnnotationError(f"{path}, record {number}: vid_name or sub[].text is missing ({error!r})") from error
    missing = sorted(wanted - found.keys())
    if missing:
        raise AnnotationError(
            f"{len(missing)} of {len(wanted)} videos have no line in {path}: {', '.join(missing[:5])}. A video without "
            'speech has one, too: {"vid_name": ..., "sub": []}'
        )
    return found


def find_file(root: str | Path, name: str) -> Path:
    """Find an annotation file below the data root, or below its folder ``annotations``.

    Raises:
        FileNotFoundError: If it is in neither; the message shows the expected tree and the commands that provide it.
    """
    for folder in (Path(root), Path(root) / "annotations"):
        if (folder / name).is_file():
            return folder / name
    where = f"no annotation file {name} below {root} (nor below {Path(root) / 'annotations'}). Expected:\n"
    if name.startswith("video/"):
        raise FileNotFoundError(
            f"{where}{VIDEO_TREE.format(root=root)}\n"
            "A small synthetic world: python -m vlpet_lightning data synthetic-video --out DIR\n"
            "The benchmark's files: those of VALUE (value-benchmark.github.io), with their names and fields.\n"
            "Then set data.init_args.root to DIR."
        )
    raise FileNotFoundError(
        f"{where}{TREE.format(root=root)}\n"
        "A small synthetic world: python -m vlpet_lightning data synthetic --out DIR\n"
        "The benchmark's annotations and features: python -m vlpet_lightning data download --out DIR\n"
        "Features of your own images: python -m vlpet_lightning data extract images --source IMAGES "
        "--out DIR/features/COCO\n"
        "Then set data.init_args.root to DIR."
    )


def _rows(path: Path, reader: Reader, read: RecordRows, split: str) -> Iterator[Row]:
    for number, record in enumerate(read_records(path, reader.key)):
        try:
            yield from read(record, split)
        except KeyError as error:
            raise AnnotationError(f"{path}, record {number}: the field {error} is missing") from error
        except (TypeError, AttributeError, ValueError) as error:
            raise AnnotationError(f"{path}, record {number}: {error}") from error


def to_samples(rows: Iterable[Row], keep_references: bool) -> Samples:
    """Collect rows as columns, with their references or without."""
    ids, texts, images, answers = StringsBuilder(), CodedBuilder(), CodedBuilder(), CodedBuilder()
    scores, ends, references = array("d"), array("q", [0]), []
    width = 1
    for row in rows:
        ids.append(row.id)
        texts.append(str(row.text))
        width = len(row.images)
        for image in row.images:
            images.append(str(image))
        for answer in row.label:
            answers.append(answer)
        scores.extend(row.label.values())
        ends.append(len(scores))
        if keep_references:
            references.append(row.reference)
    shown = images.column()
    return Samples(
        ids.column(),
        texts.column(),
        CodedTuples(shown.codes.reshape(-1, width), shown.values),
        answers.column(),
        np.array(scores, dtype=np.float32),
        np.frombuffer(ends, np.int64),
        references,
    )


def _check_unique(ids: Sequence[str], task: str, split: Split) -> None:
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
        for number, record in enumerate(read_records(path, "annotations")):
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
    **VIDEO_READERS,
}
