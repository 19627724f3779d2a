"""A small data root of clips in the formats of the VALUE benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_modules.store.writer import FeatureWriter

FRAMES, DIM = 4, 8
NAMES = {
    "tvqa": {"train": 6, "val": 4, "test_public": 2, "test_release": 2},
    "how2qa": {"train_release": 6, "val_release": 4, "test_public_release": 3},
    "tvc": {"train_release": 4, "val_release": 3, "test_release": 2},
    "yc2c": {"train_release": 4, "val_release": 3, "test_release": 2},
}
STORES = {"tvqa": "tv", "how2qa": "how2", "tvc": "tv", "yc2c": "yc2"}
CHOICES = {"tvqa": 5, "how2qa": 4}
COLORS = ("red", "green", "blue", "big", "small")
VIDEOS = 30  # a store


def video(number: int) -> str:
    return f"clip_{number:02d}"


def question(task: str, number: int, *, answered: bool) -> dict[str, Any]:
    record: dict[str, Any] = {
        "vid_name": video(number),
        "ts": f"{number}.5-{number + 2}.0",
        "qid": 100 + number,
        "q": f" which color is {number}? ",
    }
    record |= {f"a{i}": f" {COLORS[i]}. " for i in range(CHOICES[task])}
    record |= {"show_name": "Show"} if task == "tvqa" else {}
    return record | ({"answer_idx": number % CHOICES[task]} if answered else {})


def clip(task: str, number: int, *, described: bool) -> dict[str, Any]:
    record: dict[str, Any] = {"vid_name": video(number), "clip_id": 500 + number, "duration": 9}
    record |= {"ts": [1.5, 4.0]} if task == "tvc" else {}
    if not described:
        return record
    count = 2 if task == "tvc" else 1
    extra = {"type": "vt"} if task == "tvc" else {}
    words = [COLORS[(number + i) % 5] for i in range(count)]
    descs = [{"desc": f"a {word} circle", "desc_id": 1000 + 10 * number + i, **extra} for i, word in enumerate(words)]
    return record | {"descs": descs}


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def subtitles(number: int) -> dict[str, Any]:
    """Write subtitles, which are empty for every third clip."""
    lines = [" the red circle ", "is there"] if number % 3 else []
    return {"vid_name": video(number), "sub": [{"text": text, "start": 0.0, "end": 1.5} for text in lines]}


def write_video_world(root: Path) -> None:
    """Write annotations of all tasks and splits; clip ``i`` has ``1 + i % FRAMES`` frames of ``i + 1``."""
    for task, splits in NAMES.items():
        start = 0
        for split, size in splits.items():
            numbers, known = range(start, start + size), not split.startswith("test")
            make = (lambda n: question(task, n, answered=known)) if task in CHOICES else None  # noqa: B023
            records = [make(n) if make else clip(task, n, described=known) for n in numbers]
            write_lines(root / f"video/ann/{task}/{task}_{split}.jsonl", records)
            start += size
    for store in ("tv", "how2", "yc2"):
        write_lines(root / f"video/ann/{store}_subtitles.jsonl", [subtitles(n) for n in range(VIDEOS)])
        write_frames(root / "features" / store)


def write_frames(path: Path, frames: int = FRAMES) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    features = np.zeros((VIDEOS, frames, DIM), dtype=np.float16)
    for number in range(VIDEOS):
        features[number, : 1 + number % frames] = number + 1
    with FeatureWriter(path, tokens=frames, dim=DIM) as writer:
        writer.add([video(n) for n in range(VIDEOS)], features)
