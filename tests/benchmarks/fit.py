"""``fit`` from start to end: time to the first step, share of a step spent waiting for data, samples/s, peak memory.

``python -m tests.benchmarks fit [--images 20000] [--batch 32] [--steps 8] [--tiny] [--json]``

A trainer trains VL-PET-large on a model of BART-base's size with random weights, on VQA with (36, 2048) float16
features of that many images. The waiting time is the column ``data_ms`` of the callback ``Throughput``.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.progress import track
from rich.table import Table

from callbacks import Throughput
from data_modules.image_text import ImageTextDataModule
from data_modules.store.writer import FeatureWriter
from tests.benchmarks.annotations import ANSWERS, Words, write_records
from tests.benchmarks.contenders import FEATURE_DIM, IMAGE_TOKENS, config_of, recipe
from tests.data_modules.tiny_data import coco, vqa_answers, write_json, write_tokenizer
from tests.runs import quiet_trainer
from vlpet_lightning import VLBart
from vlpet_lightning.loggers import read_metrics
from vlpet_lightning.model import VLModel

QUESTIONS = 5  # per image
ROWS = 100  # different rows of random features
WINDOW = 2  # steps per measurement


class RandomBart(VLBart):
    """VLBart with random instead of pretrained weights."""

    def build(self, *, pretrained: bool = True) -> VLModel:
        return super().build(pretrained=False)


class FirstStep(Callback):
    """Record when the first step ends."""

    def __init__(self) -> None:
        self.ended: float | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.ended = self.ended or time.perf_counter()


def records(images: int, words: Words) -> Iterator[dict[str, Any]]:
    for number in range(images * QUESTIONS):
        label = {words.random.choice(ANSWERS): 1.0}
        image = coco(number % images)
        yield {"question_id": number, "img_id": image, "sent": words.question(), "label": label}


def write_root(root: Path, images: int, console: Console) -> None:
    """Write annotations, features and tokenizer."""
    words = Words()
    write_records(root / "vqa/karpathy_train.json", records(images, words))
    write_records(root / "vqa/karpathy_val.json", records(1, words))
    write_json(root / "vqa/v2_mscoco_val2014_annotations.json", {"annotations": [vqa_answers(n) for n in range(5)]})
    values = np.random.default_rng(0).standard_normal((ROWS, IMAGE_TOKENS, FEATURE_DIM), dtype=np.float32)
    (root / "features").mkdir()
    with FeatureWriter(root / "features/COCO", tokens=IMAGE_TOKENS, dim=FEATURE_DIM) as writer:
        for start in track(range(0, images, ROWS), "writing features", console=console, transient=True):
            ids = [coco(number) for number in range(start, min(start + ROWS, images))]
            writer.add(ids, values[: len(ids)])
    write_tokenizer(root / "backbone", [words.question() for _ in range(20_000)], 8000)


def fit(root: Path, options: argparse.Namespace) -> dict[str, float]:
    """Train for some steps and return the figures."""
    config_of("bart", options.tiny).save_pretrained(root / "backbone")
    placements, rules = recipe("bart", "VL-PET-large")
    logger, first = CSVLogger(root, name="run", version="a"), FirstStep()
    settings: dict[str, Any] = {"max_steps": options.steps, "limit_val_batches": 0, "precision": options.precision}
    start = time.perf_counter()
    module = RandomBart(str(root / "backbone"), placements, rules)
    data = ImageTextDataModule(
        str(root),
        str(root / "backbone"),
        ["vqa"],
        batch_size=options.batch,
        seeded_order=True,
        length_buckets=options.length_buckets,
    )
    trainer = quiet_trainer(root, logger=logger, callbacks=[Throughput(WINDOW), first], **settings)
    trainer.fit(module, data)
    assert first.ended is not None
    windows = [row for row in read_metrics(root / "run" / "a") if "throughput/step_ms" in row]
    median = {
        name: statistics.median(float(row[f"throughput/{name}"]) for row in windows)
        for name in ("data_ms", "step_ms", "samples_per_s")
    }
    return {
        "first_step_s": first.ended - start,
        "wait_percent": 100
        * sum(r["throughput/data_ms"] for r in windows)
        / sum(r["throughput/step_ms"] for r in windows),
        **median,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks fit", description=__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, help=f"{2 * WINDOW} or more; the first {WINDOW} are warm-up")
    parser.add_argument("--length-buckets", type=int, default=0)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="two layers of width 64")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(words)
    if options.steps < 2 * WINDOW:
        parser.error(f"--steps must be {2 * WINDOW} or more")
    torch.set_num_threads(options.threads)
    console = Console(stderr=options.json)
    with tempfile.TemporaryDirectory() as folder:
        write_root(Path(folder), options.images, console)
        found = fit(Path(folder), options)
    if options.json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    table = Table(title=f"fit, {options.images:,} images, batch {options.batch}, {options.steps} steps")
    for heading in found:
        table.add_column(heading, justify="right")
    table.add_row(*(f"{value:,.2f}" for value in found.values()))
    console.print(table)


if __name__ == "__main__":
    main()
