"""Annotation files of the benchmark for scenes: VQA v2 with Karpathy's splits, GQA, NLVR2, COCO captions.

Fields and file names are those that VL-T5, VL-Adapter and VL-PET read (``src/*_clip_data.py`` of HenryHZY/VL-PET), and
those of the official files from which they were made.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from data_modules.world.language import GQA, VQA, Question, ask, captions, state, ten_answers
from data_modules.world.scenes import Scene, random_scene

QUESTIONS = 4  # per image and task
LEAST_PAIRS = 8  # per split of NLVR2: with fewer, statements are true or false of too few pairs
RESTVAL = 10  # every tenth training image of COCO comes from val2014, like Karpathy's "restval"
Record = dict[str, Any]


class Part(NamedTuple):
    """One split of one store, and its share of the world's images."""

    store: str
    split: str
    share: float


PARTS = (
    Part("COCO", "train", 0.24),
    Part("COCO", "val", 0.03),
    Part("COCO", "test", 0.08),
    Part("VG", "train", 0.30),
    Part("VG", "valid", 0.02),
    Part("GQA", "testdev", 0.08),
    Part("nlvr", "train", 0.16),
    Part("nlvr", "valid", 0.02),
    Part("nlvr", "test", 0.07),
)
STATEMENTS_PER_PAIR = 2.5  # each statement is used with four pairs


@dataclass(frozen=True)
class Picture:
    """An image of the world.

    Args:
        id: Image id in the annotations.
        part: Its store and split.
        number: Its number in the world, starting from 1.
        scene: The scene it shows.
    """

    id: str
    part: Part
    number: int
    scene: Scene


def pictures(images: int, random: Random) -> list[Picture]:
    """Create all images of a world, part by part; those of NLVR2 in pairs.

    Raises:
        ValueError: If there are too few images for every part.
    """
    least = math.ceil(2 * LEAST_PAIRS / min(part.share for part in PARTS))
    if images < least:
        raise ValueError(f"a world needs {least} images or more, so that every split gets some; got {images}")
    found: list[Picture] = []
    for part in PARTS:
        count = int(images * part.share) // 2 * 2
        for index in range(count):
            number = len(found) + 1
            found.append(Picture(_image_id(part, number, index), part, number, random_scene(random)))
    return found


def _image_id(part: Part, number: int, index: int) -> str:
    if part.store == "COCO":
        folder = "train2014" if part.split == "train" and index % RESTVAL else "val2014"
        return f"COCO_{folder}_{number:012d}"
    if part.store == "nlvr":
        return f"{part.split}-{index // 2}-0-img{index % 2}"
    return f"n{number}" if part.store == "GQA" else str(number)  # like the ids of testdev and of Visual Genome


def annotation_files(world: Sequence[Picture], random: Random) -> dict[str, Any]:
    """Return the contents of all annotation files, by file name below the data root."""
    parts: dict[tuple[str, str], list[Picture]] = {}
    for picture in world:
        parts.setdefault((picture.part.store, picture.part.split), []).append(picture)
    files: dict[str, Any] = {"COCO/dataset_coco.json": _karpathy(world, random)}
    official: dict[str, list[Record]] = {"train2014": [], "val2014": []}
    for split in ("train", "val", "test"):
        files[f"vqa/karpathy_{split}.json"] = [
            record for picture in parts["COCO", split] for record in _vqa(picture, random, official)
        ]
    for folder, records in official.items():
        files[f"vqa/v2_mscoco_{folder}_annotations.json"] = {"data_subtype": folder, "annotations": records}
    for key in (("VG", "train"), ("VG", "valid"), ("GQA", "testdev")):
        files[f"GQA/{key[1]}.json"] = [record for picture in parts[key] for record in _gqa(picture, random)]
    for split in ("train", "valid", "test"):
        files[f"nlvr/{split}.json"] = _nlvr2(parts["nlvr", split], split, random)
    for folder in ("vqa", "GQA"):
        files |= _answer_tables(files, folder)
    return files


def _answer_tables(files: dict[str, Any], folder: str) -> dict[str, Any]:
    records = [
        record for name, file in files.items() if name.startswith(folder) and name.endswith(ASKED) for record in file
    ]
    answers = sorted({answer for record in records for answer in record["label"]})
    return {
        f"{folder}/trainval_ans2label.json": {answer: index for index, answer in enumerate(answers)},
        f"{folder}/trainval_label2ans.json": answers,
    }


ASKED = ("karpathy_train.json", "karpathy_val.json", "/train.json", "/valid.json")


def _vqa(picture: Picture, random: Random, official: dict[str, list[Record]]) -> list[Record]:
    records = []
    for index, question in enumerate(ask(VQA, picture.scene, random, QUESTIONS)):
        number = picture.number * 1000 + index
        said = ten_answers(question.answer, random)
        official[picture.id.split("_")[1]].append(_official(picture, question, number, said))
        records.append(
            {
                "img_id": picture.id,
                "question_id": number,
                "sent": question.text,
                "label": soft_label(said),
                "answer_type": question.kind,
                "question_type": _question_type(question),
                "is_topk_optimal": True,
            }
        )
    return records


def soft_label(answers: Sequence[str]) -> dict[str, float]:
    """Compute VQA's training targets: scores by how many of ten people gave an answer (VL-T5's preprocessing)."""
    return {answer: min(1.0, 0.3 * count) if count < 4 else 1.0 for answer, count in Counter(answers).items()}


def _official(picture: Picture, question: Question, number: int, said: Sequence[str]) -> Record:
    return {
        "question_id": number,
        "image_id": picture.number,
        "question_type": _question_type(question),
        "answer_type": question.kind,
        "multiple_choice_answer": Counter(said).most_common(1)[0][0],
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": place} for place, answer in enumerate(said, 1)
        ],
    }


def _question_type(question: Question) -> str:
    return " ".join(question.text.lower().split()[:2])


def _gqa(picture: Picture, random: Random) -> list[Record]:
    return [
        {
            "img_id": picture.id,
            "question_id": str(picture.number * 1000 + index),
            "sent": question.text,
            "label": {question.answer: 1.0},
        }
        for index, question in enumerate(ask(GQA, picture.scene, random, QUESTIONS))
    ]


def _nlvr2(images: Sequence[Picture], split: str, random: Random) -> list[Record]:
    pairs = [(images[at], images[at + 1]) for at in range(0, len(images), 2)]
    scenes = [(left.scene, right.scene) for left, right in pairs]
    records: list[Record] = []
    for group in range(int(len(pairs) * STATEMENTS_PER_PAIR)):
        text, chosen = state(scenes, random)
        for place, (number, truth) in enumerate(chosen):  # as in NLVR2, a sentence is used with several image pairs
            left, right = pairs[number]
            records.append(
                {
                    "uid": f"nlvr_{split}_{len(records)}",
                    "identifier": f"{split}-{group}-{place}-0",
                    "img0": left.id,
                    "img1": right.id,
                    "sent": text,
                    "label": int(truth),
                }
            )
    return records


def _karpathy(world: Sequence[Picture], random: Random) -> Record:
    images: list[Record] = []
    for picture in world:
        if picture.part.store != "COCO":
            continue
        folder = picture.id.split("_")[1]
        numbers = range(picture.number * 10, picture.number * 10 + 5)
        images.append(
            {
                "filepath": folder,
                "filename": f"{picture.id}.png",
                "imgid": len(images),
                "cocoid": picture.number,
                "split": "restval" if (picture.part.split, folder) == ("train", "val2014") else picture.part.split,
                "sentids": list(numbers),
                "sentences": [
                    {"raw": raw, "tokens": raw.lower().rstrip(".").split(), "imgid": len(images), "sentid": number}
                    for number, raw in zip(numbers, captions(picture.scene, random), strict=True)
                ],
            }
        )
    return {"dataset": "coco", "images": images}
