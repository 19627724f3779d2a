"""The ``importance`` command: measure which weights of a backbone matter on the training data, for a pruned start."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlpet_lightning.backbones import BACKBONES, config_of
from vlpet_lightning.checks import positive
from vlpet_lightning.cli import DataOnly, ModelOnly
from vlpet_lightning.importance import Measured, measure_importance
from vlpet_lightning.module import VLModule
from vlpet_lightning.pet import SideSite
from vlpet_lightning.pet.pruning import pruned_names, write_importance

SAMPLES = 1024  # --samples_for_fisher of the original


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's own options."""
    found = argparse.ArgumentParser(
        prog="python -m vlpet_lightning importance",
        description="Measure the importance of a backbone's weights: squared gradients of its text-only loss, summed "
        "over training samples of the config's tasks. Side networks with `start: pruned` and `importance: FILE` take "
        "the most important rows and columns as their initial weights.",
        epilog="Any override that fit takes works here, e.g. --data.init_args.root DIR. The file has the size of the "
        "backbone's layers in float32.",
        allow_abbrev=False,
    )
    found.add_argument("--config", action="append", required=True, metavar="FILE", help="a config of fit")
    found.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write, e.g. importance.pt")
    found.add_argument(
        "--samples", type=int, default=SAMPLES, metavar="N", help=f"training samples (default: {SAMPLES:,})"
    )
    found.add_argument("--device", help="device of the model (default: a GPU if there is one)")
    return found


def _check(known: argparse.Namespace) -> None:
    positive("--samples", known.samples)
    if known.out.exists():
        raise FileExistsError(f"{known.out} exists: give another --out, or delete it")
    if not known.out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out is {known.out}, but there is no folder {known.out.parent}: create it")
    try:
        torch.device(known.device or "cpu")
    except RuntimeError as error:
        raise ValueError(f"--device {known.device}: there is no such device, give cpu or cuda") from error
    if known.device is not None and known.device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {known.device}: no GPU can be used here, give cpu")


def _language_model(module: VLModule, device: str) -> Any:
    """Load the backbone with its pretrained vocabulary."""
    config = config_of(module.backbone_name, module.kind)
    return BACKBONES[module.kind].load(module.backbone_name, config.vocab_size, 0.0).to(device)


def _batches(data: Any) -> Any:
    data.setup("fit")
    return data.train_dataloader()


def importance(args: Sequence[str]) -> None:
    """Measure the importance of a backbone's weights and write it to a file.

    Args:
        args: The options of :func:`parser`; all other arguments are those of ``fit``.

    Raises:
        FileExistsError: If the file exists.
        FileNotFoundError: If its folder, the data or the backbone does not exist.
        ValueError: If an option is out of range, or the config has no data.
    """
    known, overrides = parser().parse_known_args(args)
    _check(known)
    words = [word for path in known.config for word in ("--config", path)] + overrides
    cli = ModelOnly(words, run=False)
    module, data = cli.model, DataOnly(words, run=False).data
    if data is None:
        raise ValueError("the config has no data module, whose training samples are needed: add one with --config FILE")
    if not any(isinstance(site, SideSite) for site in BACKBONES[module.kind].sites.values()):
        raise ValueError(f"importance is measured for side networks, which models of kind {module.kind!r} do not take")
    batches = _batches(data)
    lm = _language_model(module, known.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    backbone = BACKBONES[module.kind]
    weights = dict(lm.named_parameters())
    names = pruned_names(backbone.pruning_chains(lm), weights)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("samples", total=known.samples)
        measured = measure_importance(
            lm, backbone.token_embedding(lm), names, batches, known.samples, lambda: progress.advance(bar)
        )
    write_importance(known.out, weights, measured.channels, measured.weights, sum(measured.samples.values()))
    console.print(_summary(measured, known.samples, known.out), soft_wrap=True, highlight=False)


def _summary(measured: Measured, wanted: int, out: Path) -> str:
    found = sum(measured.samples.values())
    tasks = ", ".join(f"{task} {count:,}" for task, count in sorted(measured.samples.items()))
    fewer = f"; the training data ended before {wanted:,}" if found < wanted else ""
    size = out.stat().st_size / 2**20
    return (
        f"written: {out} ({size:,.1f} MiB), importance of {len(measured.weights)} matrices on {found:,} samples "
        f"({tasks}{fewer}), mean loss {measured.loss:.3f}"
    )
