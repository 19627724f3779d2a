"""Cost per step of DistributedDataParallel's options: plain, static graph, search for unused parameters.

VL-PET-large in a random BART of base size, two single-threaded gloo ranks, the options in turns.
``python -m tests.benchmarks.ddp [--steps 6] [--batch 4] [--layers 6]``
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from rich.table import Table
from transformers import BartConfig, BartForConditionalGeneration

import vlpet_lightning  # noqa: F401  # its torchvision cure must run first
from tests.conformance.test_ddp import OneOfSeveral
from tests.runs import Batches, make_batch, placements, quiet_trainer, tiny_module
from tests.tiny import save_tokenizer

RANKS, ROUNDS = 2, 5
WAYS: dict[str, dict[str, bool]] = {
    "plain": {"static_graph": False},
    "static graph": {"static_graph": True},
    "search for unused": {"static_graph": False, "find_unused_parameters": True},
}


class Clock(Callback):
    """Return the median seconds per step, excluding the first two steps."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(time.perf_counter() - self.start)

    def median(self) -> float:
        return statistics.median(self.times[2:])


def save_base(folder: Path, layers: int) -> None:
    vocabulary = save_tokenizer(folder)
    sizes: dict[str, int] = {"vocab_size": vocabulary, "d_model": 768}
    for half in ("encoder", "decoder"):
        sizes |= {f"{half}_layers": layers, f"{half}_attention_heads": 12, f"{half}_ffn_dim": 3072}
    BartForConditionalGeneration(BartConfig(**sizes)).save_pretrained(folder)


def on_one_rank(rank: int, folder: Path, steps: int, size: int) -> None:
    torch.set_num_threads(1)
    batches = [make_batch(("vqa", "gqa", "caption")[step % 3], size * RANKS, step) for step in range(steps + 2)]
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, told in WAYS.items():
            strategy = DDPStrategy(cluster_environment=OneOfSeveral(rank, RANKS), process_group_backend="gloo", **told)
            clock = Clock()
            module = tiny_module(folder / "backbone", placements=placements(rank=96))
            quiet_trainer(folder, callbacks=[clock], devices=RANKS, strategy=strategy).fit(module, Batches(batches))
            found[way].append(clock.median())
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4, help="samples of a rank")
    parser.add_argument("--layers", type=int, default=6)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, torch.random.fork_rng(devices=[]):
        folder = Path(name)
        save_base(folder / "backbone", arguments.layers)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(OneOfSeveral(0, 1).main_port)}
        words = (folder, arguments.steps, arguments.batch)
        torch.multiprocessing.start_processes(on_one_rank, words, nprocs=RANKS, start_method="fork")
        found = torch.load(folder / "0.pt", weights_only=True)
    table = Table("way", "ms a step", "over plain", title="two gloo ranks, median of rounds in turns")
    for way, times in found.items():
        ratio = statistics.median(mine / plain for mine, plain in zip(times, found["plain"], strict=True))
        table.add_row(way, f"{1000 * statistics.median(times):.0f}", f"{ratio:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
