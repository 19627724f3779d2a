"""Peak memory and time of training steps by method, beside the activation memory that the library predicts.

``python -m tests.benchmarks memory [--kinds bart t5] [--methods LST LoRA] [--batch 16 64] [--targets 5 20] [--json]``

Each peak is measured in a process of its own, over two steps. On a CPU it is the peak of the process's resident memory,
including weights and program; ``before`` is the resident memory when model and data are there. On a GPU both are memory
that torch allocated. ``tensors`` is the most memory that torch has allocated at a time during a third step, in addition
to the amount before it: the peak without program, weights and fragmentation. Times are medians of interleaved rounds in
one process; on a CPU with one thread they are the time that the process was running. The prediction is that of
:mod:`vlpet_lightning.memory`, for the kernels of either device. Ratios are to the first method.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.contenders import (
    FEATURE_DIM,
    FULL,
    IMAGE_TOKENS,
    LST,
    METHODS,
    OVERLAYS,
    make_batches,
    our_model,
    our_optimizer,
    plain_model,
    plain_optimizer,
    training_pass,
)
from tests.benchmarks.options import model_parser
from tests.benchmarks.pairs import interleaved
from vlpet_lightning.frozen_weights import cast_frozen
from vlpet_lightning.memory import fake_tensors, make_batch, saved_for_backward, size

GIB = 2**30
DEFAULT = [LST, "VL-PET-large", "LoRA", "VL-Adapter", FULL]
WAYS = ("", "plain loop", "bf16, frozen weights in bf16")


@dataclass(frozen=True)
class Shape:
    """Backbone and batch.

    Args:
        kind: ``bart`` or ``t5``.
        batch: Number of samples.
        text: Number of text tokens.
        images: Number of image tokens.
        target: Number of target tokens.
    """

    kind: str
    batch: int
    text: int
    images: int
    target: int


def reset_peak(device: str) -> None:
    """Reset the peak; on a CPU it is a counter of Linux (``man proc``: clear_refs)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    """Return the peak in bytes."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def present(device: str) -> int:
    """Return the memory in use, in bytes."""
    return torch.cuda.memory_allocated() if device == "cuda" else _status("VmRSS")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def steps(shape: Shape, method: str, way: str, options: argparse.Namespace) -> Any:
    """Return the work of one training step."""
    model: Any
    if way == "plain loop":
        model = plain_model(shape.kind, method, tiny=options.tiny).to(options.device)
        optimizer = plain_optimizer(model)
    else:
        model = our_model(shape.kind, method, tiny=options.tiny).to(options.device)
        optimizer = our_optimizer(model)
    half = "bf16" in way
    if half:
        cast_frozen(model, torch.bfloat16)
    lengths: dict[str, Any] = {"text": shape.text, "images": shape.images, "target": shape.target}
    batches = make_batches(shape.kind, [shape.batch], **lengths, device=options.device)
    return training_pass(model.loss, optimizer, batches, device=options.device, bf16=half)


def measure(shape: Shape, method: str, way: str, options: argparse.Namespace) -> dict[str, int]:
    """Return the memory before and at the peak of two training steps, and of the tensors of a third, in bytes."""
    work = steps(shape, method, way, options)
    reset_peak(options.device)
    before = present(options.device)
    work()
    work()
    highest = peak(options.device)
    return {"before": before, "peak": highest, "tensors": allocated(work, options.device)}


def allocated(work: Callable[[], None], device: str) -> int:
    """Return the most memory that torch has allocated at a time during the work, less the amount before, in bytes."""
    if device == "cuda":
        reset_peak(device)
        before = present(device)
        work()
        return peak(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes))


def predict(shape: Shape, method: str, way: str, tiny: bool) -> dict[str, int]:
    """Return the activation memory with the kernels of a CPU and a GPU, and the sizes of the model, in bytes."""
    precision = "bf16-mixed" if "bf16" in way else "32-true"
    found = {}
    with fake_tensors():
        model = our_model(shape.kind, method, tiny=tiny)
        if "bf16" in way:
            cast_frozen(model, torch.bfloat16)
        lengths: dict[str, Any] = {"text": shape.text, "target": shape.target, "features": (shape.images,)}
        batch = make_batch("vqa", shape.batch, **lengths, width=FEATURE_DIM, weighted=True)
        for device in ("cpu", "gpu"):
            found[f"activations_{device}"] = saved_for_backward(model, batch, precision=precision, gpu=device == "gpu")
        trained = sum(map(size, (p for p in model.parameters() if p.requires_grad)))
        weights = sum(map(size, _tensors(model)))
    return {**found, "weights": weights, "gradients": trained, "optimizer": 2 * trained}


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def seconds(shape: Shape, ways: Sequence[tuple[str, str]], options: argparse.Namespace) -> list[float]:
    """Return the median time of a step of each method."""
    works = {f"{method}, {way}": steps(shape, method, way, options) for method, way in ways}
    timings = interleaved(works, samples=shape.batch, rounds=options.rounds, device=options.device)
    return [timing.seconds for timing in timings]


def parser() -> argparse.ArgumentParser:
    choices = [*OVERLAYS, FULL]
    found = model_parser("memory", __doc__, methods=DEFAULT, batch=[16, 64], choices=choices)
    found.add_argument("--targets", nargs="+", type=int, default=[5, 20])
    found.add_argument("--text", type=int, default=20)
    found.add_argument("--images", type=int, default=IMAGE_TOKENS)
    found.add_argument("--rounds", type=int, default=3, help="rounds of timing; 0 measures memory alone")
    found.add_argument("--timed", nargs="+", type=int, metavar="BATCH", help="batch sizes to time; default: all")
    found.add_argument("--plain", action="store_true", help="add the plain loop")
    found.add_argument("--bf16", action="store_true", help="add bf16 with frozen weights in bf16")
    found.add_argument("--only", help=argparse.SUPPRESS)  # JSON of shape, method and way: in a process of its own
    return found


def contenders(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Return methods, and ways to train them."""
    ways = [way for way in WAYS if not way or (options.plain if "plain" in way else options.bf16)]
    return [(m, way) for way in ways for m in options.methods if way != "plain loop" or m in METHODS or m == FULL]


def results(options: argparse.Namespace, words: Sequence[str], console: Console) -> list[dict[str, Any]]:
    """Return one row per shape and contender."""
    shapes = [
        Shape(kind, batch, options.text, options.images, target)
        for kind, batch, target in product(options.kinds, options.batch, options.targets)
    ]
    found = []
    for shape in track(shapes, description="measuring", console=console, transient=True):
        rows = []
        for method, way in contenders(options):
            only = json.dumps([vars(shape), method, way])
            command = [sys.executable, "-m", "tests.benchmarks.memory", *words, "--only", only]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            predicted = {} if way == "plain loop" else predict(shape, method, way, options.tiny)
            rows.append({**vars(shape), "method": method, "way": way, **json.loads(done.stdout), **predicted})
        if options.rounds and shape.batch in (options.timed or options.batch):
            times = seconds(shape, contenders(options), options)
            rows = [row | {"seconds": time} for row, time in zip(rows, times, strict=True)]
        found += rows
    return found


COLUMNS = {
    "peak, GiB": "peak",
    "before, GiB": "before",
    "tensors, GiB": "tensors",
    "activations, GiB": "activations_cpu",
    "on a GPU, GiB": "activations_gpu",
    "s a step": "seconds",
}


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Return a table per shape, with ratios to its first row in parentheses."""
    found: dict[Shape, Table] = {}
    first: dict[str, Any] = {}
    for row in rows:
        shape = Shape(**{name: row[name] for name in Shape.__dataclass_fields__})
        if shape not in found:
            tokens = f"{shape.text} text, {shape.images} image and {shape.target} target tokens"
            found[shape] = Table("", title=f"{shape.kind}, batch {shape.batch}, {tokens}")
            for name in COLUMNS:
                found[shape].add_column(name, justify="right")
            first = row
        cells = [
            f"{row[key] / (1 if key == 'seconds' else GIB):.2f} ({row[key] / first[key]:.2f})" if key in row else ""
            for key in COLUMNS.values()
        ]
        found[shape].add_row(f"{row['method']}, {row['way']}" if row["way"] else row["method"], *cells)
    return list(found.values())


def main(words: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else list(words)
    options = parser().parse_args(words)
    torch.set_num_threads(options.threads)
    if options.only:
        shape, method, way = json.loads(options.only)
        sys.stdout.write(json.dumps(measure(Shape(**shape), method, way, options)) + "\n")
        return
    console = Console(stderr=options.json)
    rows = results(options, words, console)
    if options.json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
    else:
        for table in tables(rows):
            console.print(table)


if __name__ == "__main__":
    main()
