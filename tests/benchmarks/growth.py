"""How time and memory grow with image tokens, text length, rank, layers and the number of samples.

``python -m tests.benchmarks growth [--kind bart] [--batch 4] [--axes "image tokens" rank ...] [--out growth.png]``

Training steps are those of VL-PET-large in float32. The expected time is the formula of :mod:`vlpet_lightning.flops` at
one rate for all points, drawn as a dashed line: points on it cost what the formula says. Two kinds of memory are
measured to the byte: the activation memory (:mod:`vlpet_lightning.memory`, kernels of the CPU), and the state of the
trained parameters, which consists of their gradients and the optimiser's tensors.

The axis "samples" is a start with that many annotations of four tasks (:mod:`tests.benchmarks.annotations`), whose
cache is there: the time from the data module to its first batch, and the memory in use in addition to the libraries.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.benchmarks import annotations
from tests.benchmarks.contenders import IMAGE_TOKENS, KINDS, config_of, make_batches, our_optimizer, training_pass
from tests.benchmarks.pairs import seconds_of
from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.flops import sizes_of, training_flops
from vlpet_lightning.memory import saved_for_backward, size
from vlpet_lightning.model import VLModel
from vlpet_lightning.pet import VLPET, LargeGate, ParallelAdapter, Placement

TEXT, TARGET, RANK, LAYERS = 20, 5, 96, 6
AXES: dict[str, list[int]] = {
    "image tokens": [36, 49, 144, 196],
    "text length": [5, 10, 20, 40, 80],
    "rank": [8, 32, 96, 192, 384, 768],
    "layers": [2, 4, 6, 8, 12],
}
SAMPLES = "samples"
MIB = 2**20
MEMORY = {  # name, and colour in the plot
    "activations": ("activations", "tab:orange"),
    "state": ("gradients and optimiser", "tab:green"),
    "data": ("annotations, tokens and rows of images", "tab:red"),
}
LAYER_NAMES = ("encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers", "num_hidden_layers")


def model_of(kind: str, rank: int, layers: int, tiny: bool) -> VLModel:
    """Build VL-PET-large with random weights."""
    backbone = BACKBONES[kind]
    config = config_of(kind, tiny, dict.fromkeys(LAYER_NAMES, layers))
    gate = partial(LargeGate, rank=rank)
    placements = [
        Placement(["encoder.attn", "encoder.ffn"], partial(VLPET, rank=rank, heads=4, gate=gate)),
        Placement(["decoder.cross.value"], partial(ParallelAdapter, rank=rank)),
    ]
    rules = ["pet", "visual_embedding", "encoder.layer_norm"]
    return VLModel(backbone, backbone.build(config), placements=placements, trainable=rules, grid=None).train()


def measure(axis: str, value: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return time, operations by formula, and bytes of one training step."""
    at: dict[str, int] = {"image tokens": IMAGE_TOKENS, "text length": TEXT, "rank": RANK, "layers": LAYERS}
    at[axis] = value
    gc.collect()  # the model of the last point holds references to itself
    model = model_of(options.kind, at["rank"], at["layers"], options.tiny)
    lengths = {"text": at["text length"], "target": TARGET, "images": at["image tokens"]}
    batches = make_batches(options.kind, [options.batch], **lengths)  # type: ignore[arg-type]
    optimizer = our_optimizer(model)
    work = training_pass(model.loss, optimizer, batches)
    seconds = min(seconds_of(work, "cpu") for _ in range(2))
    source = at["text length"] + at["image tokens"]
    flops = training_flops(sizes_of(model), images=at["image tokens"], source=source, target=TARGET)
    gradients = sum(size(p) for p in model.parameters() if p.requires_grad)
    states = (value for state in optimizer.state.values() for value in state.values())
    return {
        "axis": axis,
        "value": value,
        "seconds": seconds,
        "gflop": options.batch * flops / 1e9,
        "activations": saved_for_backward(model, batches[0], gpu=False),
        "state": gradients + sum(size(value) for value in states if isinstance(value, torch.Tensor)),
    }


def measure_start(samples: int, rounds: int) -> dict[str, Any]:
    """Return time and bytes of a start with this number of samples."""
    tasks = list(annotations.SHARES)
    with TemporaryDirectory() as folder:
        annotations.write_root(Path(folder), tasks, samples)
        annotations.in_a_process(Path(folder), tasks)  # fills the cache
        starts = [annotations.in_a_process(Path(folder), tasks) for _ in range(rounds)]
    return {
        "axis": SAMPLES,
        "value": samples,
        "seconds": min(start["cpu_s"] for start in starts),
        "data": round(1e6 * min(start["after_mb"] - start["before_mb"] for start in starts)),
    }


def rate_of(points: Sequence[dict[str, Any]]) -> float:
    """Return the GFLOP per second of all steps together."""
    steps = [point for point in points if "gflop" in point]
    return sum(point["gflop"] for point in steps) / sum(point["seconds"] for point in steps)


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """Plot time above and memory below, one column per axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = list(dict.fromkeys(point["axis"] for point in points))
    figure, panels = plt.subplots(
        2, len(axes), sharex="col", squeeze=False, figsize=(3.1 * len(axes), 5.4), layout="constrained"
    )
    for column, axis in enumerate(axes):
        upper, lower = panels[:, column]
        mine = [point for point in points if point["axis"] == axis]
        values = [point["value"] for point in mine]
        upper.set_title(axis)
        lower.set_xlabel(axis)
        if axis == SAMPLES or column == 0:
            upper.set_ylabel("CPU seconds per start" if axis == SAMPLES else "CPU seconds per step")
            lower.set_ylabel("MiB")
        if axis != SAMPLES:
            formula = [point["gflop"] / rate_of(points) for point in mine]
            upper.plot(values, formula, "--", color="gray", label=f"formula, at {rate_of(points):.0f} GFLOP/s")
        upper.plot(values, [point["seconds"] for point in mine], marker="o", color="tab:blue", label="time")
        for name, (label, color) in MEMORY.items():
            if name in mine[0]:
                heights = [point[name] / MIB for point in mine]
                lower.plot(values, heights, marker="o", color=color, label=label)
        labels = [f"{value // 1000:,}k" if axis == SAMPLES else str(value) for value in values]
        lower.set_xticks(*_apart(values, labels), fontsize=8)
        for panel in (upper, lower):
            panel.set(xlim=(0, 1.08 * max(values)), ylim=(0, None))
            panel.grid(alpha=0.3)
    steps = [column for column, axis in enumerate(axes) if axis != SAMPLES]
    for row in panels:
        for column in steps:
            row[column].set_ylim(0, max(row[other].get_ylim()[1] for other in steps))
    named = {
        label: handle for panel in panels.flat for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _apart(values: Sequence[int], labels: Sequence[str]) -> tuple[list[int], list[str]]:
    """Return the values and labels that fit side by side."""
    room = 0.022 * max(values) * max(map(len, labels))
    found: list[tuple[int, str]] = []
    for value, label in zip(reversed(values), reversed(labels), strict=True):
        if not found or found[-1][0] - value > room:
            found.append((value, label))
    return [value for value, _ in found], [label for _, label in found]


def tables(points: list[dict[str, Any]], title: str) -> Iterator[Table]:
    """Yield a table of the steps and one of the starts."""
    steps, starts = ([p for p in points if (p["axis"] == SAMPLES) == wanted] for wanted in (False, True))
    if steps:
        table = Table("axis", "value", title=title)
        for column in ("s per step", "GFLOP, by formula", "GFLOP/s", "activations, MiB", "gradients, optimiser, MiB"):
            table.add_column(column, justify="right")
        for point in steps:
            memory = (f"{point[name] / MIB:.0f}" for name in ("activations", "state"))
            rate = point["gflop"] / point["seconds"]
            figures = f"{point['seconds']:.2f}", f"{point['gflop']:.0f}", f"{rate:.0f}", *memory
            table.add_row(point["axis"], str(point["value"]), *figures)
        yield table
    if starts:
        table = Table(title="warm starts")
        for column in ("samples", "s to the first batch", "MiB"):
            table.add_column(column, justify="right")
        for point in starts:
            table.add_row(f"{point['value']:,}", f"{point['seconds']:.2f}", f"{point['data'] / MIB:.0f}")
        yield table


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks growth", description=__doc__)
    parser.add_argument("--kind", choices=KINDS, default="bart")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--axes", nargs="+", choices=[*AXES, SAMPLES], default=[*AXES, SAMPLES])
    parser.add_argument("--samples", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--tiny", action="store_true", help="layers of width 64")
    parser.add_argument("--out", type=Path, help="image file to plot to")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    console = Console(stderr=options.json)
    at = [(axis, value) for axis in options.axes for value in AXES.get(axis, ())]
    # a slow minute of a shared machine falls into one round of many points, and the fastest round of a point counts
    steps = [
        measure(*point, options)
        for point in track(at * options.rounds, "measuring steps", console=console, transient=True)
    ]
    points = [min(steps[number :: len(at)], key=lambda step: step["seconds"]) for number in range(len(at))]
    counts = options.samples if SAMPLES in options.axes else []
    for count in track(counts, "measuring starts", console=console, transient=True):
        points.append(measure_start(count, options.rounds))
    if options.out is not None:
        draw(points, options.out)
    if options.json:
        sys.stdout.write(json.dumps(points, indent=1) + "\n")
        return
    for table in tables(points, f"{options.kind}, batch {options.batch}"):
        console.print(table)


if __name__ == "__main__":
    main()
