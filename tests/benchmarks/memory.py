"""Peak memory of training steps: this library against the plain loop, each in a process of its own.

``python -m tests.benchmarks memory [--kinds bart t5] [--batch 64] [--targets 5 20] [--json]``

On a CPU it is the peak of the process's resident memory during two steps, including weights and program. On a GPU it
is the peak of the memory that torch allocated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.benchmarks.contenders import (
    FULL,
    make_batches,
    our_model,
    our_optimizer,
    plain_model,
    plain_optimizer,
    training_pass,
)
from tests.benchmarks.options import model_parser
from tests.benchmarks.pairs import has_fast_bf16
from vlpet_lightning.frozen_weights import cast_frozen

GIB = 2**30
WAYS = ("plain loop", FULL, "ours", "ours, bf16, frozen weights in bf16")


def reset_peak(device: str) -> None:
    """Reset the peak; on a CPU it is a counter of Linux (``man proc``: clear_refs)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    """Return the peak in bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def measure(way: str, kind: str, method: str, options: argparse.Namespace, target: int) -> int:
    """Return the peak of two training steps in bytes."""
    torch.set_num_threads(options.threads)
    model: Any
    if way in ("plain loop", FULL):
        model = plain_model(kind, FULL if way == FULL else method, tiny=options.tiny).to(options.device)
        optimizer = plain_optimizer(model)
    else:
        model = our_model(kind, method, tiny=options.tiny).to(options.device)
        optimizer = our_optimizer(model)
    half = "bf16" in way
    if half:
        cast_frozen(model, torch.bfloat16)
    batches = make_batches(kind, [options.batch], target=target, device=options.device)
    work = training_pass(model.loss, optimizer, batches, device=options.device, bf16=half)
    reset_peak(options.device)
    work()
    work()
    return peak(options.device)


def parser() -> argparse.ArgumentParser:
    found = model_parser("memory", __doc__, methods=["VL-PET-large"], batch=64)
    found.add_argument("--targets", nargs="+", type=int, default=[5, 20])
    found.add_argument("--only", nargs=4, help=argparse.SUPPRESS)  # way, kind, method, target: in a process of its own
    return found


def main(words: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else list(words)
    options = parser().parse_args(words)
    if options.only:
        way, kind, method, target = options.only
        sys.stdout.write(f"{measure(way, kind, method, options, int(target))}\n")
        return
    console = Console(stderr=options.json)
    ways = [way for way in WAYS if "bf16" not in way or has_fast_bf16(options.device)]
    cases = [(k, m, t, w) for k in options.kinds for m in options.methods for t in options.targets for w in ways]
    results: list[dict[str, Any]] = []
    for kind, method, target, way in track(cases, description="measuring", console=console, transient=True):
        command = [sys.executable, "-m", "tests.benchmarks.memory", *words, "--only", way, kind, method, str(target)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results.append({"kind": kind, "method": method, "target": target, "way": way, "bytes": int(done.stdout)})
    if options.json:
        sys.stdout.write(json.dumps(results, indent=1) + "\n")
        return
    table = Table("backbone", "method", "target", "", title=f"peak memory, batch {options.batch}")
    table.add_column("GiB", justify="right")
    table.add_column("of the plain loop", justify="right")
    plain = 0
    for row in results:
        plain = row["bytes"] if row["way"] == "plain loop" else plain
        share = f"{row['bytes'] / plain:.0%}"
        table.add_row(row["kind"], row["method"], str(row["target"]), row["way"], f"{row['bytes'] / GIB:.2f}", share)
    console.print(table)


if __name__ == "__main__":
    main()
