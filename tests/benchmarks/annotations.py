"""Start-up time and memory with large annotation files: each start is a new process, up to its first training batch.

``python -m tests.benchmarks annotations [--samples 2000000] [--tasks vqa gqa nlvr2 caption] [--json]``

The first start has an empty cache folder, the second one finds the cache of the first. The files have the fields and
the proportions of the published ones; words are random. The features are one number per image.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from data_modules.store.writer import FeatureWriter
from tests.data_modules.tiny_data import coco, vqa_answers, write_json, write_tokenizer

SHARES = {"vqa": 605_102, "gqa": 1_075_062, "nlvr2": 86_373, "caption": 566_747}  # published training samples
IMAGES = 100_000
HELD_OUT = 1_000_000  # number of the first evaluation image
CAPTIONS = 5  # per image
EVALUATED = 100  # evaluation samples per task
ANSWERS = [f"answer {number}" for number in range(3000)]


class Words:
    """Sentences of random words with a long-tailed distribution.

    Args:
        seed: Seed of the words.
        vocabulary: Number of different words.
    """

    def __init__(self, seed: int = 0, vocabulary: int = 5000) -> None:
        self.random = random.Random(seed)
        syllables = [a + b for a in "bdfghklmnprstw" for b in ("a", "e", "i", "o", "u", "an", "er", "ing")]
        self.words = ["".join(self.random.choices(syllables, k=self.random.randint(1, 3))) for _ in range(vocabulary)]
        self.ends = np.cumsum(1 / np.arange(3, vocabulary + 3)).tolist()

    def __call__(self, count: int) -> list[str]:
        return self.random.choices(self.words, cum_weights=self.ends, k=count)

    def question(self) -> str:
        return " ".join(self(round(min(20, max(3, self.random.lognormvariate(1.8, 0.35)))))) + "?"


def vqa_records(count: int, words: Words, first: int = 0) -> Iterator[dict[str, Any]]:
    for number in range(count):
        answers = words.random.sample(ANSWERS, words.random.randint(1, 4))
        yield {
            "answer_type": "other",
            "img_id": coco(first + number % IMAGES),
            "label": dict(zip(answers, (1, 0.6, 0.3, 0.3), strict=False)),
            "question_id": 1000 * number,
            "question_type": "what is the",
            "sent": words.question(),
        }


def gqa_records(count: int, words: Words, first: int = 0) -> Iterator[dict[str, Any]]:
    for number in range(count):
        label = {words.random.choice(ANSWERS[:1800]): 1.0}
        yield {
            "img_id": str(first + number % IMAGES),
            "label": label,
            "question_id": f"{number:08d}",
            "sent": words.question(),
        }


def nlvr2_records(count: int, words: Words, split: str, first: int = 0) -> Iterator[dict[str, Any]]:
    for number in range(count):
        yield {
            "identifier": f"{split}-{number}-0-0",
            "img0": f"nlvr-{first + number % IMAGES}",
            "img1": f"nlvr-{first + (number + 1) % IMAGES}",
            "label": number % 2,
            "sent": " ".join(words(16)),
            "uid": f"nlvr2_{split}_{number}",
        }


def caption_records(count: int, words: Words) -> Iterator[dict[str, Any]]:
    for number in range(-(-count // CAPTIONS)):
        sentences = []
        for part in range(CAPTIONS):
            tokens = words(11)
            sentence = {"tokens": tokens, "raw": " ".join(tokens).capitalize() + ".", "imgid": number}
            sentences.append(sentence | {"sentid": number * CAPTIONS + part})
        split, image = ("train", number) if number >= EVALUATED else ("val", HELD_OUT + number)
        name = {"filepath": "val2014", "filename": f"{coco(image)}.jpg", "cocoid": number, "imgid": number}
        yield (
            name
            | {"sentids": list(range(number * CAPTIONS, (number + 1) * CAPTIONS)), "split": split}
            | {"sentences": sentences}
        )


def write_records(path: Path, records: Iterator[dict[str, Any]], key: str | None = None) -> None:
    """Write a JSON list, record by record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.write("[" if key is None else f'{{"dataset": "coco", "{key}": [')
        for number, record in enumerate(records):
            file.write((", " if number else "") + json.dumps(record))
        file.write("]" if key is None else "]}")


def write_root(root: Path, tasks: Sequence[str], samples: int) -> None:
    """Write the annotations, features and tokenizer of ``samples`` training samples over all tasks."""
    words, total = Words(), sum(SHARES[task] for task in tasks)
    counts = {task: samples * SHARES[task] // total for task in tasks}
    if "vqa" in tasks:
        write_records(root / "vqa/karpathy_train.json", vqa_records(counts["vqa"], words))
        write_records(root / "vqa/karpathy_val.json", vqa_records(EVALUATED, words, HELD_OUT))
        answers = [vqa_answers(1000 * number) for number in range(EVALUATED)]
        write_json(root / "vqa/v2_mscoco_val2014_annotations.json", {"annotations": answers})
    if "gqa" in tasks:
        for name, count, first in (("train", counts["gqa"], 0), ("valid", 1, 0), ("testdev", EVALUATED, HELD_OUT)):
            records = ({**r, "question_id": f"{name}{r['question_id']}"} for r in gqa_records(count, words, first))
            write_records(root / f"GQA/{name}.json", records)
    if "nlvr2" in tasks:
        for name, count, first in (("train", counts["nlvr2"], 0), ("valid", EVALUATED, HELD_OUT)):
            write_records(root / f"nlvr/{name}.json", nlvr2_records(count, words, name, first))
    if "caption" in tasks:
        write_records(root / "COCO/dataset_coco.json", caption_records(counts["caption"], words), "images")
    for store, name in (("COCO", "COCO_val2014_{:012d}"), ("VG", "{}"), ("GQA", "{}"), ("nlvr", "nlvr-{}")):
        (root / "features").mkdir(exist_ok=True)
        size = HELD_OUT + EVALUATED + 1
        with FeatureWriter(root / "features" / store, tokens=1, dim=1) as writer:
            writer.add([name.format(number) for number in range(size)], np.zeros((size, 1, 1)))
    write_tokenizer(root / "tokenizer", [words.question() for _ in range(20_000)], 8000)


def start(root: str, tasks: list[str]) -> dict[str, float]:
    """Set up a data module and fetch its first batch, in this process.

    Returns:
        Seconds of both, their CPU time, and megabytes in use before, after and at most.
    """
    from data_modules.image_text import ImageTextDataModule

    before = resident()
    begun, begun_cpu = time.perf_counter(), time.process_time()
    module = ImageTextDataModule(root, f"{root}/tokenizer", tasks)
    module.prepare_data()
    module.setup("fit")
    ready = time.perf_counter()
    next(iter(module.train_dataloader()))
    first, cpu = time.perf_counter(), time.process_time() - begun_cpu
    return {
        "samples": len(module.datasets["train"]),
        "setup_s": ready - begun,
        "first_batch_s": first - ready,
        "cpu_s": cpu,
        "before_mb": before,
        "after_mb": resident(),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def resident() -> float:
    """Return the megabytes that this process holds in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def in_a_process(root: Path, tasks: list[str]) -> dict[str, float]:
    """Return the figures of :func:`start` in a new process."""
    words = [sys.executable, "-m", "tests.benchmarks", "annotations", "--root", str(root), "--tasks", *tasks]
    environment = {**os.environ, "XDG_CACHE_HOME": str(root / "cache")}
    return json.loads(subprocess.run(words, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks annotations", description=__doc__)
    parser.add_argument("--samples", type=int, default=2_000_000)
    parser.add_argument("--tasks", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--root", help="make one start with these files and print its figures")
    options = parser.parse_args(words)
    if options.root is not None:
        sys.stdout.write(json.dumps(start(options.root, options.tasks)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_root(Path(folder), options.tasks, options.samples)
        found = {name: in_a_process(Path(folder), options.tasks) for name in ("cold", "warm")}
    if options.json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    table = Table(title=f"{options.samples:,} samples of {', '.join(options.tasks)}")
    for heading in ("start", *found["cold"]):
        table.add_column(heading, justify="right")
    for name, figures in found.items():
        table.add_row(name, *(f"{value:,.1f}" for value in figures.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
