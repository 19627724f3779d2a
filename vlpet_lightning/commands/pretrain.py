"""``pretrain``: train a small language model and its tokenizer on text, so that there is something to freeze."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from vlpet_lightning.backbones import ADDED_TOKENS, BACKBONES
from vlpet_lightning.backbones.small import small_bart, word_tokenizer
from vlpet_lightning.batch import IGNORED
from vlpet_lightning.checks import above_zero, positive, within
from vlpet_lightning.optim import linear_schedule
from vlpet_lightning.version import __version__

RECORD = "pretrain.json"
SPLITS = ("train", "val")
WARMUP = 0.05
SCORED = 400  # held-out pairs of a kind
GENERATED = ("vqa", "gqa", "nlvr2", "tvqa", "how2qa")  # kinds with one right answer, scored by exact match
MAX_ANSWER = 20

Results = dict[str, dict[str, float]]


class Pair(NamedTuple):
    """A line of the text files."""

    source: str
    target: str
    kind: str


def read_pairs(path: Path) -> list[Pair]:
    """Read a file of JSON lines with ``source``, ``target`` and ``kind``.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If a line is not such an object, or there is none; names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no text at {path}: make it with `python -m vlpet_lightning data synthetic --out DIR` and give --text "
            "DIR/text"
        )
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            pairs.append(Pair(entry["source"], entry["target"], entry["kind"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number} is not a JSON object with source, target and kind ({error!r}): {line[:80]!r}"
            ) from error
    if not pairs:
        raise ValueError(f"{path} is empty: expected one JSON object with source, target and kind a line")
    return pairs


class Pairs:
    """Tokenised pairs, padded a batch at a time.

    Args:
        pairs: ``n`` pairs.
        tokenizer: Their tokenizer.

    Raises:
        ValueError: If a text holds a token that is reserved for images.
    """

    def __init__(self, pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> None:
        self.pad = int(tokenizer.pad_token_id)
        self.sources: list[list[int]] = tokenizer([pair.source for pair in pairs])["input_ids"]
        self.targets: list[list[int]] = tokenizer([pair.target for pair in pairs])["input_ids"]
        first = len(tokenizer) - len(ADDED_TOKENS)
        for pair, *ids in zip(pairs, self.sources, self.targets, strict=True):
            if max(map(max, ids)) >= first:
                raise ValueError(f"a text holds a token that is reserved for images (<extra_id_0> and so on): {pair}")

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(map(len, self.sources + self.targets))

    def order(self, batch_size: int, steps: int, seed: int) -> list[np.ndarray]:
        """Rows of every batch of a run, epoch after epoch.

        Batches are not sorted by length: that would put one kind of pairs into each, and the loss stays far higher.
        """
        random = np.random.default_rng(seed)
        batches: list[np.ndarray] = []
        while len(batches) < steps:
            batches += np.array_split(random.permutation(len(self)), -(-len(self) // batch_size))
        return batches[:steps]

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """``(B, T)`` source ids and ``(B, L)`` labels, right-padded."""
        return (
            _padded([self.sources[row] for row in rows], self.pad),
            _padded([self.targets[row] for row in rows], IGNORED),
        )


def _padded(texts: Sequence[Sequence[int]], fill: int) -> Tensor:
    padded = np.full((len(texts), max(map(len, texts))), fill)
    for row, ids in zip(padded, texts, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(padded)


class TextModule(LightningModule):
    """Teaches a language model to write targets behind sources.

    Args:
        lm: The language model.
        lr: Peak learning rate.
    """

    def __init__(self, lm: Any, lr: float) -> None:
        super().__init__()
        self.lm = lm
        self.lr = lr

    def losses(self, sources: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, L)`` losses of target tokens, 0 on padding, and whether each is the most likely one."""
        decoder_inputs = BACKBONES["bart"].decoder_inputs(self.lm, labels)
        mask = sources != self.lm.config.pad_token_id
        logits = self.lm(
            input_ids=sources, attention_mask=mask, decoder_input_ids=decoder_inputs, use_cache=False
        ).logits
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return losses.view_as(labels), logits.argmax(dim=-1) == labels

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean loss of a target token."""
        losses, _ = self.losses(*batch)
        loss = losses.sum() / (batch[1] != IGNORED).sum()
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(losses))
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW without weight decay: it would shrink the rows that no text trains."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0, fused=True)
        schedule = linear_schedule(optimizer, int(self.trainer.max_steps), WARMUP)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(module: TextModule, pairs: Pairs, *, steps: int, batch_size: int, seed: int) -> None:
    """Train for a number of steps, on a GPU where there is one."""
    batches: Any = pairs.order(batch_size, steps, seed)
    trainer = Trainer(
        max_steps=steps,
        gradient_clip_val=1.0,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[RichProgressBar(refresh_rate=10)],
    )
    trainer.fit(module, DataLoader(batches, batch_size=None, collate_fn=pairs.batch))
    module.cpu()


@torch.no_grad()
def score(module: TextModule, pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Results:
    """Held-out results by kind, over the first :data:`SCORED` pairs of each.

    Returns:
        By kind ``loss`` and ``token_accuracy`` (percent, teacher forcing), and ``exact_match`` (percent, greedy
        decoding) where there is one right answer.
    """
    module.eval()
    kinds = {kind: [pair for pair in pairs if pair.kind == kind][:SCORED] for kind in sorted({p.kind for p in pairs})}
    results: Results = {}
    for kind in track(kinds, description="scoring held-out text"):
        table = Pairs(kinds[kind], tokenizer)
        loss, right, tokens, matches = 0.0, 0, 0, 0
        for start in range(0, len(table), batch_size):
            sources, labels = table.batch(range(start, min(start + batch_size, len(table))))
            losses, hits = module.losses(sources, labels)
            loss, right, tokens = loss + float(losses.sum()), right + int(hits.sum()), tokens + int((labels >= 0).sum())
            if kind in GENERATED:
                matches += _matches(module.lm, sources, labels, tokenizer)
        results[kind] = {"pairs": len(table), "loss": loss / tokens, "token_accuracy": 100 * right / tokens}
        if kind in GENERATED:
            results[kind]["exact_match"] = 100 * matches / len(table)
    return results


def _matches(lm: Any, sources: Tensor, labels: Tensor, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many greedily decoded answers equal the target's text."""
    pad = int(lm.config.pad_token_id)
    answers = lm.generate(
        input_ids=sources,
        attention_mask=sources != pad,
        generation_config=BACKBONES["bart"].generation(lm.config, num_beams=1, max_length=MAX_ANSWER),
    )
    said = tokenizer.batch_decode(answers, skip_special_tokens=True)
    wanted = tokenizer.batch_decode(labels.masked_fill(labels == IGNORED, pad), skip_special_tokens=True)
    return sum(map(str.__eq__, said, wanted))


def results_table(results: Results) -> Table:
    """The table for a terminal."""
    table = Table(title="held-out text")
    for column in ("kind", "pairs", "loss", "token accuracy", "exact match"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind, row in results.items():
        exact = f"{row['exact_match']:.1f}" if "exact_match" in row else ""
        table.add_row(kind, f"{row['pairs']:.0f}", f"{row['loss']:.3f}", f"{row['token_accuracy']:.1f}", exact)
    return table


def fingerprint(files: Sequence[Path], settings: dict[str, Any]) -> str:
    """What a backbone follows from: its text, its settings and this version, as one SHA-256."""
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return hashlib.sha256(json.dumps([__version__, digests, settings], sort_keys=True).encode()).hexdigest()


def _earlier(out: Path, wanted: str) -> Results | None:
    """The results of a backbone that is there already and is the wanted one.

    Raises:
        FileExistsError: If something else is there, which must not be overwritten.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / RECORD).is_file():
        raise FileExistsError(f"{out} was not written by this command (no {RECORD} in it): choose another --out")
    record = json.loads((out / RECORD).read_text())
    return record["results"] if record["fingerprint"] == wanted else None


def _replace(old: Path, new: Path) -> None:
    """Put a finished folder in the place of an earlier one."""
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
    """A model and a tokenizer from the training text; the held-out text decides how long texts may be."""
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
    """Write a backbone beside its place and put it there when it is whole."""
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

    A backbone that follows from the same text and settings is not trained again.

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
        seed: Of the weights and of the order of the pairs.

    Raises:
        FileNotFoundError: If the text is not there.
        FileExistsError: If out holds anything but an earlier backbone of this command.
        ValueError: If a text file cannot be read, or a setting is impossible.
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
