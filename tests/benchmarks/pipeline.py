"""Samples/s of the VQA input pipeline (sampler, tokens, features, collation), in one process from a warm store.

``python -m tests.benchmarks.pipeline [--images 2000] [--batch-size 500] [--questions 605102]``

The second table is the share of padding with and without length buckets, for text lengths like those of VQA and
captions; the third one is the start-up time for this number of questions, without and with cached tokens.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from data_modules.annotations.image_text import read_split
from data_modules.batches.dataset import image_rows
from data_modules.batches.length_buckets import LengthBuckets
from data_modules.batches.prompts import input_texts
from data_modules.batches.sampling import EvalSampler, PlanSampler, TaskMixSampler
from data_modules.batches.tokens import TokenTable
from data_modules.image_text import ImageTextDataModule
from data_modules.store.array_cache import ArrayCache
from data_modules.store.store import FeatureStore
from data_modules.store.writer import FeatureWriter
from tests.benchmarks.contenders import caption_lengths, question_lengths
from tests.data_modules.tiny_data import coco, vqa_record, write_json, write_tokenizer
from vlpet_lightning.backbones import load_tokenizer
from vlpet_lightning.tasks import TASKS

SHAPE = (36, 2048)  # CLIP RN101's grid, pooled to 6 x 6
QUESTIONS_AN_IMAGE = 5


def write_root(root: Path, images: int) -> None:
    records = [vqa_record(i, coco(i % images)) for i in range(images * QUESTIONS_AN_IMAGE)]
    write_json(root / "vqa/karpathy_train.json", records)
    write_json(root / "vqa/karpathy_val.json", records[:1])
    answers = [{"question_id": 0, "answers": [{"answer": "red"}] * 10}]
    write_json(root / "vqa/v2_mscoco_val2014_annotations.json", {"annotations": answers})
    write_tokenizer(root / "tokenizer")
    (root / "features").mkdir()
    values = np.random.default_rng(0).standard_normal((100, *SHAPE), dtype=np.float32).astype(np.float16)
    with FeatureWriter(root / "features/COCO", tokens=SHAPE[0], dim=SHAPE[1]) as writer:
        for start in range(0, images, 100):
            ids = [coco(i) for i in range(start, min(start + 100, images))]
            writer.add(ids, values[: len(ids)])


def rate(work: Callable[[], int]) -> float:
    """Return the best samples/s of three rounds, because other processes only slow it down."""
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        samples = work()
        rates.append(samples / (time.perf_counter() - start))
    return max(rates)


def paddings(count: int, batch_size: int) -> Table:
    """Compute the padding of texts in training and evaluation batches; a question's encoder also reads image tokens."""
    title = f"padding of {count:,} samples in batches of {batch_size}"
    table = Table("samples", "setting", "of the text", "of the encoder's input", title=title)
    generator = torch.Generator().manual_seed(0)
    for kind, draw in (("questions", question_lengths), ("captions", caption_lengths)):
        lengths = draw(count, generator).numpy()
        sizes, step = {kind: count}, {kind: batch_size}
        samplers: dict[str, PlanSampler] = {"length_buckets: 0": TaskMixSampler(sizes, step)}
        for number in (10, 50, 200):
            buckets = {kind: LengthBuckets(lengths, number)}
            samplers[f"length_buckets: {number}"] = TaskMixSampler(sizes, step, buckets=buckets)
        samplers["eval_by_length: true"] = EvalSampler(sizes, step, lengths={kind: lengths})
        for name, sampler in samplers.items():
            found = [lengths[plan.rows] for plan in sampler]
            padded, real = sum(len(part) * part.max() for part in found), sum(part.sum() for part in found)
            encoder = f"{(padded - real) / (padded + SHAPE[0] * count):.1%}" if kind == "questions" else ""
            table.add_row(kind, name, f"{1 - real / padded:.1%}", encoder)
    return table


def starts(folder: Path, questions: int) -> Table:
    """Measure the seconds of each part of a start, run once, because a first start is of interest."""
    words = "what is the color of a man woman dog in front behind how many people are there wearing hat".split()
    pick = random.Random(0)
    records = [
        {**vqa_record(i, coco(i % 100_000)), "sent": f"{' '.join(pick.choices(words, k=7))} {i}?"}
        for i in range(questions)
    ]
    write_json(folder / "large/vqa/karpathy_train.json", records)
    with FeatureWriter(folder / "large/features/COCO", tokens=1, dim=1) as writer:
        writer.add([coco(i) for i in range(100_000)], np.zeros((100_000, 1, 1)))
    tokenizer, cache = load_tokenizer(f"{folder}/tokenizer"), ArrayCache(folder / "cache")
    table = Table("part", "seconds", title=f"a start with {questions:,} questions")

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        table.add_row(name, f"{time.perf_counter() - start:,.2f}")
        return result

    samples = timed("annotations", lambda: read_split(folder / "large", TASKS["vqa"], "train"))
    timed("rows of images", lambda: image_rows(samples, FeatureStore(folder / "large/features/COCO")))
    for name in ("tokens, first start", "tokens, second start"):
        timed(name, lambda: TokenTable(input_texts(TASKS["vqa"], samples, "vqa: "), tokenizer, 20, cache=cache))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--questions", type=int, default=605_102)
    options = parser.parse_args()
    table = Table(
        "step", "samples/s", title=f"VQA, {SHAPE} float16, batch {options.batch_size}, {options.images} images"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_root(Path(folder), options.images)
        module = ImageTextDataModule(
            folder, f"{folder}/tokenizer", ["vqa"], batch_size=options.batch_size, answer_draw="seeded"
        )
        module.setup("fit")
        loader, data = module.train_dataloader(), module.datasets["train"].tasks["vqa"]
        plans = list(loader.sampler)
        rows = [data.images[plan.rows].reshape(-1) for plan in plans]
        steps = {
            "sampler": lambda: sum(len(plan.rows) for plan in loader.sampler),
            "tokens": lambda: sum(len(data.texts.padded(plan.rows, 1)[0]) for plan in plans),
            "answers": lambda: sum(len(data.draw(plan.rows, 0)[0]) for plan in plans),
            "features": lambda: sum(len(data.store.gather(r)) for r in rows),
            "whole pipeline": lambda: sum(map(len, loader)),
        }
        for name, work in steps.items():
            table.add_row(name, f"{rate(work):,.0f}")
        Console().print(table)
        Console().print(paddings(options.questions, options.batch_size))
        Console().print(starts(Path(folder), options.questions))


if __name__ == "__main__":
    main()
