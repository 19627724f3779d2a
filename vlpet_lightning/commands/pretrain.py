"""The ``pretrain`` command: train a small language model and its tokenizer on text, as a backbone to freeze."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.backbones.small import small_bart, word_tokenizer
from vlpet_lightning.backbones.small_vlm import chat_tokenizer, image_processor, small_smolvlm
from vlpet_lightning.backbones.template import read_template
from vlpet_lightning.checks import above_zero, choice, positive, within
from vlpet_lightning.pretraining.pairs import Pair, Pairs, read_pairs
from vlpet_lightning.pretraining.prompts import Prompts
from vlpet_lightning.pretraining.training import CausalTextModule, Results, TextModule, fit, score
from vlpet_lightning.tasks import TASKS
from vlpet_lightning.version import __version__

RECORD = "pretrain.json"
SPLITS = ("train", "val")

Settings: TypeAlias = dict[str, Any]
Made: TypeAlias = tuple[Any, PreTrainedTokenizerBase, Callable[[Sequence[Pair]], Pairs]]


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


class Recipe(NamedTuple):
    """Construction of one kind of backbone.

    Args:
        make: Returns the model, its tokenizer and what tokenises pairs, from all pairs and the settings.
        module: Trains the model.
        others: Further files of the backbone, which save themselves to a folder.
        layers: Default number of layers.
    """

    make: Callable[[Sequence[Pair], Sequence[Pair], Settings], Made]
    module: type[TextModule]
    others: Callable[[], Sequence[Any]]
    layers: int


def _bart(train: Sequence[Pair], held_out: Sequence[Pair], settings: Settings) -> Made:
    tokenizer = word_tokenizer(part for pair in train for part in (pair.source, pair.target))

    def tokenized(pairs: Sequence[Pair]) -> Pairs:
        return Pairs(pairs, tokenizer)

    lm = small_bart(
        len(tokenizer),
        **{name: settings[name] for name in ("width", "layers", "heads", "order_std")},
        positions=max(128, *(tokenized(pairs).longest for pairs in (train, held_out))),
    )
    return lm, tokenizer, tokenized


def _smolvlm(train: Sequence[Pair], held_out: Sequence[Pair], settings: Settings) -> Made:
    family: Any = BACKBONES["smolvlm"]
    instructions = [spec.instruction for spec in TASKS.values()]
    texts = (part for pair in train for part in (pair.source, pair.target))
    tokenizer = chat_tokenizer([family.text_template, *instructions, *texts])
    template = read_template(tokenizer, family.text_template, family.image_template)

    def tokenized(pairs: Sequence[Pair]) -> Pairs:
        return Prompts(pairs, tokenizer, template)

    for pairs in (train, held_out):
        tokenized(pairs)
    return small_smolvlm(tokenizer, **{name: settings[name] for name in SIZES}), tokenizer, tokenized


SIZES = ("width", "layers", "heads")
RECIPES = {
    "bart": Recipe(_bart, TextModule, list, layers=2),
    "smolvlm": Recipe(_smolvlm, CausalTextModule, lambda: [image_processor()], layers=4),
}


def _save(out: Path, parts: Sequence[Any], record: dict[str, Any]) -> None:
    """Write a backbone to a temporary folder and move it into place when it is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as beside:
        folder = Path(beside) / out.name
        for part in parts:
            part.save_pretrained(folder)
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        _replace(out, folder)


def pretrain(
    *,
    text: Path,
    out: Path,
    kind: Literal["bart", "smolvlm"] = "bart",
    width: int = 128,
    layers: int | None = None,
    heads: int = 4,
    steps: int = 900,
    batch_size: int = 64,
    lr: float = 2e-3,
    order_std: float = 1.0,
    seed: int = 0,
) -> None:
    """Train a small language model and its tokenizer on pairs of texts and save them as a backbone.

    That of a SmolVLM is trained on its own prompt, with descriptions in the place of images; its vision tower and its
    projector have random weights. A backbone from the same text and settings is reused.

    Args:
        text: Folder with train.jsonl and val.jsonl, lines of source, target and kind.
        out: Folder to write: the model, its tokenizer, and pretrain.json with its settings and results.
        kind: Architecture of the model.
        width: Width of the model.
        layers: Layers of the encoder and of the decoder; null for 2, or 4 of a SmolVLM, which has a decoder alone.
        heads: Attention heads.
        steps: Training steps.
        batch_size: Pairs in a batch.
        lr: Peak learning rate.
        order_std: Standard deviation of BART's untrained token embeddings that a vision-and-language model reads as the
            positions of its image tokens; at this width 1.0 does far better than 0.1.
        seed: Seed of the initial weights and of the order of the pairs.

    Raises:
        FileNotFoundError: If the text is not there.
        FileExistsError: If out holds anything but an earlier backbone of this command.
        ValueError: If a text file cannot be read, or a setting is out of range.
    """
    choice("kind", kind, tuple(RECIPES))
    recipe = RECIPES[kind]
    layers = recipe.layers if layers is None else layers
    counts: dict[str, int] = {
        "width": width,
        "layers": layers,
        "heads": heads,
        "steps": steps,
        "batch_size": batch_size,
    }
    for name, value in counts.items():
        positive(name, value)
    above_zero("lr", lr)
    within("order_std", order_std, 0)
    console = Console()
    files = [text / f"{split}.jsonl" for split in SPLITS]
    train, held_out = map(read_pairs, files)
    settings: Settings = {**counts, "lr": lr, "order_std": order_std, "seed": seed}
    settings |= {} if kind == "bart" else {"kind": kind}
    mark = fingerprint(files, settings)
    results = _earlier(out, mark)
    if results is not None:
        console.print(results_table(results))
        console.print(f"{out} is up to date: the same text and settings", soft_wrap=True)
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm, tokenizer, tokenized = recipe.make(train, held_out, settings)
    module = recipe.module(lm, lr)
    fit(module, tokenized(train), steps=steps, batch_size=batch_size, seed=seed)
    results = score(module, held_out, tokenizer, tokenized, 4 * batch_size)
    record = {"fingerprint": mark, "version": __version__, "settings": settings, "results": results}
    _save(out, [lm, tokenizer, *recipe.others()], record)
    console.print(results_table(results))
    console.print(f"written: {out}", soft_wrap=True)
