"""How the cost of a training step grows with image tokens, text length, rank and layers.

``python -m tests.benchmarks growth [--kind bart] [--batch 4] [--out growth.png] [--json]``

Times are of VL-PET-large in float32. The expected cost is the formula of :mod:`vlpet_lightning.flops`; a straight line
in the plot means that a step costs what the formula says.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.benchmarks.contenders import IMAGE_TOKENS, KINDS, config_of, make_batches, our_optimizer, training_pass
from tests.benchmarks.pairs import seconds_of
from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.flops import sizes_of, training_flops
from vlpet_lightning.model import VLModel
from vlpet_lightning.pet import VLPET, LargeGate, ParallelAdapter, Placement

TEXT, TARGET, RANK, LAYERS = 20, 5, 96, 6
AXES: dict[str, list[int]] = {
    "image tokens": [36, 49, 144, 196],
    "text length": [5, 10, 20, 40, 80],
    "rank": [8, 32, 96, 192, 384, 768],
    "layers": [2, 4, 6, 8, 12],
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
    """Return time and formula of one point."""
    at: dict[str, int] = {"image tokens": IMAGE_TOKENS, "text length": TEXT, "rank": RANK, "layers": LAYERS}
    at[axis] = value
    model = model_of(options.kind, at["rank"], at["layers"], options.tiny)
    lengths = {"text": at["text length"], "target": TARGET, "images": at["image tokens"]}
    batches = make_batches(options.kind, [options.batch], **lengths)  # type: ignore[arg-type]
    work = training_pass(model.loss, our_optimizer(model), batches)
    work()
    seconds = min(seconds_of(work, "cpu") for _ in range(options.rounds))  # other processes only slow it down
    source = at["text length"] + at["image tokens"]
    flops = training_flops(sizes_of(model), images=at["image tokens"], source=source, target=TARGET)
    return {"axis": axis, "value": value, "seconds": seconds, "gflop": options.batch * flops / 1e9}


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """Plot time against the formula's operations, one panel per axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(AXES), figsize=(3.4 * len(AXES), 3), layout="constrained", sharey=True)
    for panel, axis in zip(panels, AXES, strict=True):
        mine = [point for point in points if point["axis"] == axis]
        panel.plot([point["gflop"] for point in mine], [point["seconds"] for point in mine], marker="o")
        for point in mine:
            panel.annotate(str(point["value"]), (point["gflop"], point["seconds"]), fontsize=8)
        panel.set(title=axis, xlabel="GFLOP of a step, by formula", xlim=(0, None), ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds per step")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def rows(points: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table."""
    for point in points:
        rate = point["gflop"] / point["seconds"]
        yield point["axis"], str(point["value"]), f"{point['seconds']:.2f}", f"{point['gflop']:.0f}", f"{rate:.0f}"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks growth", description=__doc__)
    parser.add_argument("--kind", choices=KINDS, default="bart")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="layers of width 64")
    parser.add_argument("--out", type=Path, help="image file to plot to")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    console = Console(stderr=options.json)
    todo = [(axis, value) for axis, values in AXES.items() for value in values]
    points = [
        measure(axis, value, options) for axis, value in track(todo, "measuring", console=console, transient=True)
    ]
    if options.out is not None:
        draw(points, options.out)
    if options.json:
        sys.stdout.write(json.dumps(points, indent=1) + "\n")
        return
    table = Table("axis", "value", title=f"{options.kind}, batch {options.batch}")
    for column in ("s per step", "GFLOP, by formula", "GFLOP/s"):
        table.add_column(column, justify="right")
    for row in rows(points):
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
