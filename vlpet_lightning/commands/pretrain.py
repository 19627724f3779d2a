"""The ``pretrain`` command: train a small language model and its tokenizer on text, as a backbone to freeze."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from vlpet_lightning.backbones.small import small_bart, word_tokenizer
from vlpet_lightning.checks import above_zero, positive, within
from vlpet_lightning.pretraining.pairs import Pair, Pairs, read_pairs
from vlpet_lightning.pretraining.training import Results, TextModule, fit, score
from vlpet_lightning.version import __version__

RECORD = "pretrain.json"
SPLITS = ("train", "val")


def results_table(results: Results) -> Table:
    """Return the results as a table for the terminal."""
    table = Table(title="held-out text")
    for column in ("kind", "pairs", "loss", "token accuracy", "exact match"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind, row in results.items():
        exact = f"{row['exact_match']:.1f}" if "exact_match" in row else ""
        table.add_row(kind, f"{row['pairs']:.0f}", f"{row['loss']:.3f}", f"{row['token_accuracy']:.1f}", exact)
    return table


def fingerprint(files: Sequence[Path], settings: dict[str, Any]) -> str:
    """Return the SHA-256 of the inputs that determine a backbone: text, settings and library version."""
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return hashlib.sha256(json.dumps([__version__, digests, settings], sort_keys=True).encode()).hexdigest()


def _earlier(out: Path, wanted: str) -> Results | None:
    """Return the results of an existing backbone if its inputs are the same.

    Raises:
        FileExistsError: If the folder holds something else, which must not be overwritten.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / RECORD).is_file():
        raise FileExistsError(f"{out} was not written by this command (no {RECORD} in it): choose another --out")
    record = json.loads((out / RECORD).read_text())
    return record["results"] if record["fingerprint"] == wanted else None


def _replace(old: Path, new: Path) -> None:
    """Replace an earlier folder by a finished one."""
    if old.exists():
        aside = new.with_name(new.name + ".old")
        os.replace(old, aside)
        os.replace(new, old)
        shutil.rmtree(aside)
    else:
        os.replace(new, old)


def _trained(
    train: Sequence[Pair], held_out: Sequence[Pair], settings: dict[str, Any]
) -> tuple[TextModule, PreTrainedTokenizerBase]:
    """Train a model and a tokenizer; the maximum length covers the held-out text as well."""
    tokenizer = word_tokenizer(part for pair in train for part in (pair.source, pair.target))
    pairs = Pairs(train, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["seed"])
        lm = small_bart(
            len(tokenizer),
            **{name: settings[name] for name in ("width", "layers", "heads", "order_std")},
            positions=max(128, pairs.longest, Pairs(held_out, tokenizer).longest),
        )
    module = TextModule(lm, settings["lr"])
    fit(module, pairs, **{name: settings[name] for name in ("steps", "batch_size", "seed")})
    return module, tokenizer


def _save(out: Path, lm: Any, tokenizer: PreTrainedTokenizerBase, record: dict[str, Any]) -> None:
    """Write a backbone to a temporary folder and move it into place when it is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as beside:
        folder = Path(beside) / out.name
        lm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        _replace(out, folder)


def pretrain(
    *,
    text: Path,
    out: Path,
    width: int = 128,
    layers: int = 2,
    heads: int = 4,
    steps: int = 900,
    batch_size: int = 64,
    lr: float = 2e-3,
    order_std: float = 1.0,
    seed: int = 0,
) -> None:
    """Train a small BART and its tokenizer on pairs of texts and save them as a backbone.

    A backbone from the same text and settings is reused.

    Args:
        text: Folder with train.jsonl and val.jsonl, lines of source, target and kind.
        out: Folder to write: the model, its tokenizer, and pretrain.json with its settings and results.
        width: Width of the model.
        layers: Layers of the encoder, and of the decoder.
        heads: Attention heads.
        steps: Training steps.
        batch_size: Pairs in a batch.
        lr: Peak learning rate.
        order_std: Standard deviation of the untrained token embeddings that a vision-and-language model reads as the
            positions of its image tokens; at this width 1.0 does far better than 0.1.
        seed: Seed of the initial weights and of the order of the pairs.

    Raises:
        FileNotFoundError: If the text is not there.
        FileExistsError: If out holds anything but an earlier backbone of this command.
        ValueError: If a text file cannot be read, or a setting is out of range.
    """
    counts = {"width": width, "layers": layers, "heads": heads, "steps": steps, "batch_size": batch_size}
    for name, value in counts.items():
        positive(name, value)
    above_zero("lr", lr)
    within("order_std", order_std, 0)
    console = Console()
    files = [text / f"{split}.jsonl" for split in SPLITS]
    train, held_out = map(read_pairs, files)
    settings = {**counts, "lr": lr, "order_std": order_std, "seed": seed}
    mark = fingerprint(files, settings)
    results = _earlier(out, mark)
    if results is not None:
        console.print(results_table(results))
        console.print(f"{out} is up to date: the same text and settings", soft_wrap=True)
        return
    module, tokenizer = _trained(train, held_out, settings)
    results = score(module, held_out, tokenizer, 4 * batch_size)
    record = {"fingerprint": mark, "version": __version__, "settings": settings, "results": results}
    _save(out, module.lm, tokenizer, record)
    console.print(results_table(results))
    console.print(f"written: {out}", soft_wrap=True)
