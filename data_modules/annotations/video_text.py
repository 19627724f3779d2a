"""Readers of the VALUE benchmark's files for TVQA, How2QA, TVC and YC2C.

Fields and texts are those of ``src/video/*_data.py`` of HenryHZY/VL-PET.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_modules.annotations.records import Reader, RecordRows, Row

Record = dict[str, Any]


def choice_text(record: Record, choices: int) -> str:
    """Format a question with its time span and its choices.

    >>> choice_text({"q": "Who? ", "ts": "1.0-2.5", "a0": "A cat. ", "a1": "a dog"}, 2)
    '[Q] Who? [TS] (1.0-2.5) [Choices] a0: A cat. a1: a dog.'
    """
    offered = " ".join(f"a{number}: {record[f'a{number}'].strip('. ')}." for number in range(choices))
    return f"[Q] {record['q'].strip()} [TS] ({record['ts']}) [Choices] {offered}"


def _choices(count: int) -> RecordRows:
    """Return a reader of multiple-choice questions; those of a test split may lack the right answer."""

    def rows(record: Record, split: str) -> Iterator[Row]:
        label: dict[str, float] = {}
        reference: dict[str, Any] = {}
        if split == "train" or "answer_idx" in record:
            right = record["answer_idx"]
            if right not in range(count):
                raise ValueError(f"answer_idx must be one of 0 to {count - 1}, got {right!r}")
            label = {f"a{right}": 1.0}
            reference = {"label": f"a{right}", "choices": count}
        yield Row(str(record["qid"]), choice_text(record, count), (str(record["vid_name"]),), label, reference)

    return rows


def _span(record: Record) -> str:
    return f"[TS] ({record['ts']})"  # ts is a list and is formatted as one: "([1.5, 4.0])"


def _nothing(record: Record) -> str:
    return ""


def _descriptions(text: Any) -> RecordRows:
    """Return a reader with one sample per description, which is its only reference, as in the original."""

    def rows(record: Record, split: str) -> Iterator[Row]:
        clip, video = str(record["clip_id"]), (str(record["vid_name"]),)
        if split == "test" and "descs" not in record:
            yield Row(clip, text(record), video, {}, {})
            return
        for entry in record["descs"]:
            caption = entry["desc"]
            reference = {"captions": [caption], "clip_id": clip}
            yield Row(str(entry["desc_id"]), text(record), video, {caption: 1.0}, reference)

    return rows


def _clips(text: Any) -> RecordRows:
    """Return a reader with one sample per clip, with all its descriptions as references."""

    def rows(record: Record, split: str) -> Iterator[Row]:
        clip = str(record["clip_id"])
        captions = [entry["desc"] for entry in record.get("descs", [])]
        reference = {"captions": captions, "clip_id": clip} if captions else {}
        yield Row(clip, text(record), (str(record["vid_name"]),), {}, reference)

    return rows


VIDEO_READERS: dict[str, Reader] = {
    "tvqa": Reader(_choices(5)),
    "how2qa": Reader(_choices(4)),
    "tvc": Reader(_descriptions(_span), by_clip=_clips(_span)),
    "yc2c": Reader(_descriptions(_nothing), by_clip=_clips(_nothing)),
}
