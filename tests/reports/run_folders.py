"""Run folders as a training and a test leave them, written without either."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import yaml

from vlpet_lightning.protocol import FORMAT, digest

TASKS = ("vqa", "gqa", "nlvr2", "caption")
LARGE = [{"at": ["encoder.attn"], "unit": {"class_path": "vlpet_lightning.pet.VLPET", "init_args": {"rank": 96}}}]


def make_record(
    *, seed: int = 1, percent: float = 4.16, tasks: tuple[str, ...] = TASKS, **changes: Any
) -> dict[str, Any]:
    """Return a protocol record of a test."""
    split = {
        task: {
            "part": "whole",
            "samples": 20,
            "annotations": {f"{task}.json": "a" * 64},
            "store": {"name": "COCO", "checksum": "b" * 64},
        }
        for task in tasks
    }
    record: dict[str, Any] = {
        "format": FORMAT,
        "protocol": "original",
        "stage": "test",
        "items": {"precision": "32-true", "selected": "last epoch"},
        "tasks": list(tasks),
        "splits": {"test": split},
        "inputs": {"shuffle_features": False},
        "generation": dict.fromkeys(tasks, "first step"),
        "scale": {},
        "seed": seed,
        "training": {"lr": 0.001, "max_epochs": 20, "data_seed": seed},
        "trained": {"seed": seed, "splits": {"train": split}, "inputs": {"shuffle_features": False}},
        "backbone": {"kind": "bart", "name": "facebook/bart-base", "sizes": {"d_model": 768}, "checksums": {}},
        "method": {"summary": "VLPET", "published": None},
        "parameters": {"trainable": round(1e4 * percent), "total": 10**6, "percent": percent},
        "versions": {"torch": "2.13.0"},
    } | changes
    return record | {"digest": digest(record)}


def answers_of(task: str, right: list[bool]) -> list[dict[str, Any]]:
    """Return predictions of questions of which some are answered correctly."""
    if task == "vqa":
        reference: dict[str, Any] = {"answers": ["red"] * 10, "label": {"red": 1.0}}
    elif task == "nlvr2":
        reference = {"label": "red", "identifier": "x"}
    else:
        reference = {"label": {"red": 1.0}}
    return [
        {
            "question_id": f"{task}{number:03d}",
            "prediction": "red" if fine else "blue",
            "images": ["a"],
            "text": "What?",
            "reference": reference,
        }
        for number, fine in enumerate(right)
    ]


def write_run(
    folder: Path,
    scores: dict[str, float] | None = None,
    record: dict[str, Any] | None = None,
    *,
    right: dict[str, list[bool]] | None = None,
    placements: Any = LARGE,
    losses: int = 0,
) -> Path:
    """Write the folder of a run.

    Args:
        folder: The folder.
        scores: Test scores such as ``vqa/accuracy_original``.
        record: Protocol record of the test; None for a run without one.
        right: Whether each question is answered correctly, by task; also gives the score, unless ``scores`` does.
        placements: Placements in the saved config; None for no config.
        losses: Number of logged losses and validation scores.
    """
    folder.mkdir(parents=True)
    mains = {"vqa": "accuracy_original", "caption": "cider"}
    found = {
        f"{task}/{mains.get(task, 'accuracy')}": 100 * sum(some) / len(some) for task, some in (right or {}).items()
    }
    found |= scores or {}
    rows: list[dict[str, Any]] = [{"step": step, "train/vqa/loss": 1 / (step + 1)} for step in range(losses)]
    rows += [{"step": step, "val/vqa/accuracy_original": 50 + step} for step in range(losses)]
    if found:
        rows.append({f"test/{name}": value for name, value in found.items()} | {"step": losses})
    if record is not None:
        rows = [row | {"protocol": record["digest"]} for row in rows]
        (folder / "protocol_test.json").write_text(json.dumps(record))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)
    if placements is not None:
        seed = 0 if record is None else record["seed"]
        model = {"class_path": "vlpet_lightning.VLBart", "init_args": {"placements": placements, "backbone": "x"}}
        (folder / "config.yaml").write_text(yaml.safe_dump({"seed_everything": seed, "model": model}))
    for task, some in (right or {}).items():
        path = folder / "predictions" / f"test_{task}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"protocol": record or {}, "predictions": answers_of(task, some)}))
    return folder


def all_scores(vqa: float, caption: float = 110.0) -> dict[str, float]:
    """Return test scores of the four tasks."""
    return {
        "vqa/accuracy_original": vqa,
        "vqa/accuracy": vqa + 0.5,
        "gqa/accuracy": 50.0,
        "nlvr2/accuracy": 70.0,
        "nlvr2/consistency": 30.0,
        "caption/cider": caption,
    }
