"""Cached columns of training splits: the same samples, and never those of another file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from data_modules.annotations import column_cache, image_text
from data_modules.annotations.image_text import read_split
from data_modules.annotations.records import AnnotationError, Samples
from data_modules.store.array_cache import ArrayCache
from tests.data_modules.tiny_data import coco, vqa_record, write_json, write_world
from vlpet_lightning.tasks import IMAGE_TEXT, TASKS


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArrayCache:
    monkeypatch.setattr(column_cache, "KEEP_FROM", 1)
    write_world(tmp_path)
    return ArrayCache(tmp_path / "cache")


def columns(samples: Samples) -> list:
    return [
        list(samples.ids),
        list(samples.texts),
        list(samples.images),
        list(samples.answers),
        samples.scores.tolist(),
        samples.offsets.tolist(),
        samples.references,
    ]


def never(*_: object) -> None:
    raise AssertionError("decoded again")


@pytest.mark.parametrize("task", IMAGE_TEXT)
def test_a_second_start_does_not_decode(
    task: str, tmp_path: Path, cache: ArrayCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = columns(read_split(tmp_path, TASKS[task], "train"))
    assert columns(read_split(tmp_path, TASKS[task], "train", cache=cache)) == plain
    monkeypatch.setattr(image_text, "read_records", never)
    cached = read_split(tmp_path, TASKS[task], "train", cache=cache)
    assert columns(cached) == plain
    assert cached.scores.dtype == np.float32


def test_a_changed_file_is_decoded_again_even_if_size_and_time_are_the_same(tmp_path: Path, cache: ArrayCache) -> None:
    path = tmp_path / "vqa/karpathy_train.json"
    before = path.stat()
    read_split(tmp_path, TASKS["vqa"], "train", cache=cache)
    path.write_text(path.read_text().replace("thing 3", "thong 3"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read_split(tmp_path, TASKS["vqa"], "train", cache=cache).texts[3] == "What colour is thong 3?"


def test_limits_and_evaluation_splits_are_kept_apart(tmp_path: Path, cache: ArrayCache) -> None:
    assert len(read_split(tmp_path, TASKS["vqa"], "train", cache=cache)) == 7
    assert len(read_split(tmp_path, TASKS["vqa"], "train", 3, cache=cache)) == 3
    assert all(read_split(tmp_path, TASKS["vqa"], "val", cache=cache).references)


def test_a_damaged_file_of_the_cache_is_made_again(tmp_path: Path, cache: ArrayCache) -> None:
    plain = columns(read_split(tmp_path, TASKS["gqa"], "train", cache=cache))
    (file,) = cache.folder.glob("*.npz")
    content = bytearray(file.read_bytes())
    content[content.index(b"Where")] ^= 1
    file.write_bytes(content)
    assert columns(read_split(tmp_path, TASKS["gqa"], "train", cache=cache)) == plain


def test_annotations_that_cannot_be_used_are_never_cached(tmp_path: Path, cache: ArrayCache) -> None:
    write_json(tmp_path / "vqa/karpathy_train.json", [vqa_record(i, coco(i)) for i in (0, 1, 1)])
    for _ in range(2):
        with pytest.raises(AnnotationError, match="come twice"):
            read_split(tmp_path, TASKS["vqa"], "train", cache=cache)
    assert json.loads((tmp_path / "vqa/karpathy_train.json").read_text())
    assert not list(cache.folder.glob("*"))


def test_small_splits_are_not_cached(tmp_path: Path) -> None:
    write_world(tmp_path)
    read_split(tmp_path, TASKS["vqa"], "train", cache=ArrayCache(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
