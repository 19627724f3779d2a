"""Time and memory of loading a decoder-only model, with and without its vision tower.

``python -m tests.benchmarks vlm_loading [--model NAME] [--layers N] [--rounds 3] [--json]``

A model of the sizes of a model known by name is written to a temporary folder, with random weights in bfloat16, and
loaded in float32 as for training. Every load is a process of its own, both ways in turn; the table has medians. The
file is in the page cache. ``peak`` is the largest resident memory during the load, ``after`` that after it; both are
beside that of the process before, with all libraries imported. Pages of the file that were read count as resident while
it is open.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks.memory import GIB, peak, present, reset_peak
from vlpet_lightning.backbones import BACKBONES, backbone_of
from vlpet_lightning.backbones.causal import CausalBackbone
from vlpet_lightning.backbones.unloaded_tower import weights_or_rows

WAYS = {"with the tower": True, "without": False}
KNOWN = sorted(name for one in BACKBONES.values() if isinstance(one, CausalBackbone) for name in one.known)


def write_model(name: str, layers: int | None, folder: str) -> dict[str, Any]:
    """Write a model with random weights, and return its numbers of parameters.

    Args:
        name: Model known by name.
        layers: Number of layers of the decoder; None for all.
        folder: Where to write.
    """
    family: Any = backbone_of(name)
    config = family.config(name)
    text = family.text_config(config)
    if layers is not None:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    with torch.device("meta"):
        lm = family.build(config).bfloat16()
    lm.to_empty(device="cpu").tie_weights()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.normal_(std=0.02)
    lm.save_pretrained(folder)
    tower = weights_or_rows(lm.get_submodule(family.tower_path))
    projector = weights_or_rows(family.projector(lm))
    inside = family.projector_path.startswith(f"{family.tower_path}.")
    count = sum(p.numel() for p in tower.values()) - (sum(p.numel() for p in projector.values()) if inside else 0)
    return {
        "model": name,
        "layers": text.num_hidden_layers,
        "parameters": sum(p.numel() for p in lm.parameters()),
        "tower": count,
    }


def measure(folder: str, tower: bool) -> dict[str, float]:
    """Load a model in this process; returns seconds and bytes."""
    family: Any = backbone_of(folder)
    family = family if tower else family.without_tower()
    vocabulary = family.text_config(family.config(folder)).vocab_size
    reset_peak("cpu")
    before, start = present("cpu"), time.perf_counter()
    lm = family.load(folder, vocabulary, 0.0)
    seconds = time.perf_counter() - start
    del family
    found = {"seconds": seconds, "peak": peak("cpu") - before, "after": present("cpu") - before}
    del lm
    return found


def results(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each way of loading."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        written = write_model(options.model, options.layers, folder)
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way in WAYS:
                command = [sys.executable, "-m", "tests.benchmarks.vlm_loading", "--only", folder, way]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                runs[way].append(json.loads(done.stdout))
    medians = {
        way: {key: statistics.median(run[key] for run in found) for key in found[0]} for way, found in runs.items()
    }
    return [written | {"way": way} | found for way, found in medians.items()]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the results as a table."""
    first = rows[0]
    counts = f"{first['parameters']:,} parameters, {first['tower']:,} of them in the tower"
    found = Table("", title=f"{first['model']}, {first['layers']} decoder layers, {counts}")
    for heading in ("s", "peak, GiB", "after, GiB"):
        found.add_column(heading, justify="right")
    for row in rows:
        found.add_row(row["way"], f"{row['seconds']:.2f}", *(f"{row[key] / GIB:.2f}" for key in ("peak", "after")))
    return found


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m tests.benchmarks vlm_loading", description=__doc__)
    found.add_argument("--model", choices=KNOWN, default="HuggingFaceTB/SmolVLM-256M-Instruct")
    found.add_argument("--layers", type=int, help="layers of the decoder; default: those of the model")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--folder", help="where to write the model; default: the folder of temporary files")
    found.add_argument("--json", action="store_true")
    found.add_argument("--only", nargs=2, help=argparse.SUPPRESS)  # folder and way: in a process of its own
    return found


def main(words: Sequence[str] | None = None) -> None:
    options = parser().parse_args(words)
    torch.set_num_threads(1)
    if options.only:
        folder, way = options.only
        sys.stdout.write(json.dumps(measure(folder, WAYS[way])) + "\n")
        return
    rows = results(options)
    if options.json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
    else:
        Console().print(table(rows))


if __name__ == "__main__":
    main()
