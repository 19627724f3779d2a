"""Annotation files of the VALUE benchmark for clips: TVQA, How2QA, TVC and YC2C with subtitles, and text-only pairs.

Fields and file names are those of the benchmark (``src/video/*_data.py`` of HenryHZY/VL-PET). Its test splits have no
public answers; here they have answers, so that a run can be scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

from data_modules.annotations.video_text import VIDEO_READERS
from data_modules.world.clips import NAMES, SECONDS, Clip, random_clip
from data_modules.world.scenes import COLORS
from vlpet_lightning.tasks import TASKS, VIDEO_TEXT

ORDINALS = ("first", "last")
QUESTIONS = 4  # per clip
TVC_DESCRIPTIONS = 4
WORDY = (
    "tvqa",
    "how2qa",
    "tvqa",
    "how2qa",
    "tvqa",
    "how2qa",
    "tvc",
    "yc2c",
)  # choices are harder to learn than captions
Record = dict[str, Any]
Files = dict[str, list[Record]]


class Part(NamedTuple):
    """One split of one store, and its share of the world's clips."""

    store: str
    split: str
    share: float


PARTS = (
    Part("tv", "train", 0.36),
    Part("tv", "val", 0.03),
    Part("tv", "test", 0.08),
    Part("how2", "train", 0.22),
    Part("how2", "val", 0.03),
    Part("how2", "test", 0.06),
    Part("yc2", "train", 0.16),
    Part("yc2", "val", 0.02),
    Part("yc2", "test", 0.04),
)


class Film(NamedTuple):
    """A clip of the world, with its id in the annotations and its store and split."""

    id: str
    part: Part
    clip: Clip


def films(count: int, random: Random) -> list[Film]:
    """Create all clips of a world, part by part.

    Raises:
        ValueError: If there are too few clips for every part.
    """
    least = round(4 / min(part.share for part in PARTS))
    if count < least:
        raise ValueError(f"a world needs {least} clips or more, so that every split gets some; got {count}")
    return [
        Film(f"{part.store}_{part.split}_{number:05d}", part, random_clip(random))
        for part in PARTS
        for number in range(round(count * part.share))
    ]


# --- questions and descriptions ----------------------------------------------------------------------------------


# all questions have the same length: a small language model finds the choices by position


def _order(clip: Clip, random: Random) -> tuple[str, str]:
    number = random.randrange(len(clip.shows))
    return f"What color is the {ORDINALS[number]} object?", clip.shows[number].color


def _shape(clip: Clip, random: Random) -> tuple[str, str]:
    show = random.choice(clip.shows)
    return f"What color is the moving {show.shape}?", show.color


def _speaker(clip: Clip, random: Random) -> tuple[str, str]:
    return "Who is it that is speaking?", clip.speaker


TEMPLATES = {"tvqa": (_order, _order, _shape, _speaker), "how2qa": (_order, _shape)}
CHOICES = {"tvqa": 5, "how2qa": 4}


def ask(task: str, clip: Clip, random: Random) -> Record:
    """Create a question about a clip with its choices, in the fields of the benchmark."""
    text, answer = random.choice(TEMPLATES[task])(clip, random)
    others = [word for word in (NAMES if answer in NAMES else COLORS) if word != answer]
    offered = random.sample([answer, *random.sample(others, CHOICES[task] - 1)], CHOICES[task])
    record: Record = {"ts": f"0.0-{clip.frames * SECONDS}", "q": text}
    record |= {f"a{number}": word for number, word in enumerate(offered)}
    return record | {"answer_idx": offered.index(answer)}


def describe(task: str, clip: Clip, random: Random) -> str:
    """Describe a clip, as a person would."""
    names = [f"{'an' if show.color[0] in 'aeiou' else 'a'} {show.name}" for show in clip.shows]
    if task == "yc2c":
        return "show " + " and then ".join(names)
    return random.choice(("First {} .", "We see {} .", "There is {} .")).format(" , then ".join(names))


# --- files -------------------------------------------------------------------------------------------------------


def annotation_files(world: Sequence[Film], random: Random) -> Files:
    """Return the records of all annotation files, by file name below the data root."""
    files: Files = {name: [] for spec in map(TASKS.get, VIDEO_TEXT) if spec for name in _names(spec)}
    numbers = iter(range(1, 10**9))
    for place, film in enumerate(world):
        store, split, _ = film.part
        lines = [
            {"text": line, "start": SECONDS * number, "end": SECONDS * (number + 1)}
            for number, line in enumerate(film.clip.lines)
        ]
        files[f"video/ann/{store}_subtitles.jsonl"].append({"vid_name": film.id, "sub": lines})
        for task in VIDEO_TEXT:
            wanted = TASKS[task].splits[split]
            if wanted.features != store:
                continue
            number = next(numbers)
            name = wanted.annotations[place % len(wanted.annotations)]  # TVQA has two test files
            records = _questions(task, film, number, random) if task in CHOICES else [_clip(task, film, number, random)]
            files[name] += records
    return files


def _names(spec: Any) -> list[str]:
    return [name for split in spec.splits.values() for name in split.annotations] + [spec.subtitles]


def _questions(task: str, film: Film, number: int, random: Random) -> list[Record]:
    extra = {"show_name": "shapes"} if task == "tvqa" else {}
    return [
        {"vid_name": film.id, "qid": number * 10 + index, **ask(task, film.clip, random), **extra}
        for index in range(QUESTIONS)
    ]


def _clip(task: str, film: Film, number: int, random: Random) -> Record:
    duration = film.clip.frames * SECONDS
    record: Record = {"vid_name": film.id, "clip_id": number, "duration": duration}
    record |= {"ts": [0.0, duration]} if task == "tvc" else {}
    extra = {"type": "v"} if task == "tvc" else {}
    descs = [
        {"desc": describe(task, film.clip, random), "desc_id": number * 10 + index, **extra}
        for index in range(TVC_DESCRIPTIONS if task == "tvc" else 1)
    ]
    return record | {"descs": descs}


# --- text-only pairs ---------------------------------------------------------------------------------------------


def text_pairs(count: int, random: Random) -> list[dict[str, str]]:
    """Create pairs about new clips: a task's input followed by a description of the clip, and the target."""
    pairs = []
    for index in range(count):
        task, clip = WORDY[index % len(WORDY)], random_clip(random)
        film = Film("", PARTS[0], clip)
        record = (
            {**ask(task, clip, random), "vid_name": "", "qid": 0} if task in CHOICES else _clip(task, film, 0, random)
        )
        row = next(iter(VIDEO_READERS[task].rows(record, "train")))
        spec = TASKS[task]
        asked = spec.template.format(prompt=spec.prompt, text=row.text, subtitles=" ".join(clip.lines))
        seen = [show.name for show in clip.shows]
        if task in CHOICES and index % 3 == 0:  # only the relevant objects: easier, and learnt first
            right = record[f"a{record['answer_idx']}"]
            seen = [name for name in seen if name.startswith(right)] or seen[:1]
        pairs.append({"source": f"{asked}{' ; '.join(seen)}", "target": next(iter(row.label)), "kind": task})
    return pairs
