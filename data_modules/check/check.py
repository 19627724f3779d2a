"""``data check``: all checks of a config's data at once, before a run."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import Progress

from data_modules.annotations.records import AnnotationError, Samples
from data_modules.annotations.splits import images_of, leaks, some, val_is_test, wordless
from data_modules.batches.answers import best_answers
from data_modules.batches.prompts import input_texts
from data_modules.benchmark import BenchmarkDataModule
from data_modules.check.lengths import Lengths, lost_by_cutting, plot, token_lengths
from data_modules.check.report import Finding, Level, Part, findings_table, lengths_table, parts_table
from data_modules.extraction.image_files import ImageFiles, UnreadableImage
from data_modules.store.rows import AnyStore
from data_modules.store.store import FeatureStore, FeatureStoreError, MissingFeatures
from data_modules.store.verify import odd_rows
from vlpet_lightning.backbones import damaged_weights, load_tokenizer
from vlpet_lightning.cli import data_from_config
from vlpet_lightning.tasks import TASKS, TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "val", "test")
WIDTH = 120
SAMPLE = 1024  # rows of a store whose values are looked at without --checksums
SAMPLE_FILES = 64  # image files that are read without --checksums
ROWS = 256  # rows read at once


class CheckFailed(RuntimeError):
    """Raised if a check failed, so that a run would stop or be wrong; the report printed before has the details."""


class DataCheck:
    """Checks of a data module's data, which collect all findings without stopping at the first.

    Args:
        data: The data module; it is neither set up nor changed.
        splits: Splits to check.
        checksums: Whether to read all features and verify their checksums; otherwise only file sizes are checked.
        progress: Progress display.
    """

    def __init__(self, data: BenchmarkDataModule, splits: Sequence[str], checksums: bool, progress: Progress) -> None:
        self.data = data
        self.splits = splits
        self.checksums = checksums
        self.progress = progress
        self.parts: dict[tuple[str, str], Part] = {}
        self.lengths: list[Lengths] = []
        self.findings: list[Finding] = []
        self.cures: dict[str, None] = {}  # advice shared by several findings, shown once
        self._stores: dict[str, AnyStore | None] = {}
        self._images: dict[tuple[str, str], set[str]] = {}
        self._trained: dict[str, set[str]] = {}  # answers of each task's training split
        self._tokenizer: PreTrainedTokenizerBase | None = None
        try:
            self._tokenizer = load_tokenizer(data.tokenizer)
        except (FileNotFoundError, ValueError) as error:
            self._failed("tokenizer", error)
        for problem in damaged_weights(Path(data.tokenizer)):
            self._say("failed", "backbone", problem)

    def run(self) -> None:
        """Check all splits of all tasks, then the overlap between them."""
        for limit, splits in ((self.data.limit_train, "train"), (self.data.limit_eval, "val, test")):
            if limit is not None:
                self._say(
                    "note", splits, f"limited by the config: only the first {limit:,} samples of a task are checked"
                )
        wanted = [(spec, split) for spec in self.data.tasks.values() for split in self.splits]
        for spec, split in self.progress.track(wanted, description="checking"):
            if split == "test" and "val" in self.splits and val_is_test(spec):
                self._say("note", f"{spec.name} test", "the same files as val, by design: not looked at twice")
            else:
                self._check(spec, split)
        for leak in leaks(self._images):
            self.parts[leak.other].shared = max(self.parts[leak.other].shared, len(leak.images))
            self._say("failed", " ".join(leak.other), str(leak))

    def _check(self, spec: TaskSpec, split: str) -> None:
        part = self.parts[spec.name, split] = Part(spec.name, split)
        store = self._store(spec, split)
        try:
            samples = self.data.read(spec, split)
        except (OSError, AnnotationError, FeatureStoreError) as error:
            self._failed(f"{spec.name} {split}", error)
            return
        part.samples = len(samples)
        part.whole = (self.data.limit_train if split == "train" else self.data.limit_eval) is None
        images = self._images[spec.name, split] = images_of(samples)
        part.images = len(images)
        if store is not None:
            try:
                store.rows(sorted(images))
                part.featureless = 0
            except MissingFeatures as error:
                part.featureless = len(error.missing)
                self._failed(f"{spec.name} {split}", error)
            except FeatureStoreError:  # a damaged index is reported as a finding of the store
                pass
        self._answers(part, samples)
        if self._tokenizer is not None:
            self._lengths(spec, split, samples, self._tokenizer)

    def _store(self, spec: TaskSpec, split: str) -> AnyStore | None:
        """Return the store of a split, checked on first use; None if it cannot be opened."""
        name = spec.splits[split].features
        if name not in self._stores:
            self._stores[name] = None
            try:
                store = self._stores[name] = self.data.store(spec, split)
            except (OSError, FeatureStoreError, ValueError) as error:
                self._failed(f"features {name}", error)
                return None
            if isinstance(store, FeatureStore):
                self._features(name, store)
            elif isinstance(store, ImageFiles):
                self._image_files(name, store)
        return self._stores[name]

    def _features(self, name: str, store: FeatureStore) -> None:
        files = store.inspect(self.checksums)
        for wrong in self.progress.track(files, total=len(store.files), description=f"features {name}"):
            if wrong is not None:
                self._failed(f"features {name}", wrong)
        self._values(name, store)

    def _image_files(self, name: str, files: ImageFiles) -> None:
        """Look for files that cannot be read: in a sample, or in all files with ``--checksums``."""
        count = len(files) if self.checksums else min(SAMPLE_FILES, len(files))
        chosen = [files.paths[int(place)] for place in np.linspace(0, len(files) - 1, count)]
        for path in self.progress.track(chosen, description=f"images {name}"):
            try:
                files.read(path)
            except UnreadableImage as error:
                self._failed(f"images {name}", error)

    def _values(self, name: str, store: FeatureStore) -> None:
        """Look for rows that are not finite or all zero: in a sample, or in all rows with ``--checksums``."""
        if not all(entry in store.files for entry in store.meta["shards"]):
            return  # shards are fetched when they are needed
        rows = np.arange(len(store))
        if not self.checksums and len(store) > SAMPLE:
            rows = np.linspace(0, len(store) - 1, SAMPLE).astype(np.int64)
        looked = f"of {len(rows):,} {'sampled ' if len(rows) < len(store) else ''}rows"
        blocks = np.array_split(rows, -(-len(rows) // ROWS)) if len(rows) else []
        found: dict[str, list[str]] = {"not finite": [], "all zero": []}
        try:
            for block in self.progress.track(blocks, description=f"values of {name}"):
                for kind, ids in odd_rows(store, block).items():
                    found[kind] += ids
        except FeatureStoreError:  # a damaged shard has a finding of its own
            return
        levels: dict[str, Level] = {"not finite": "failed", "all zero": "warning"}
        for kind, level in levels.items():
            if found[kind]:
                self._say(level, f"features {name}", f"{len(found[kind]):,} {looked} are {kind}: {some(found[kind])}")

    def _answers(self, part: Part, samples: Samples) -> None:
        where = f"{part.task} {part.split}"
        empty = wordless(samples)
        if empty:
            self._say("failed", where, f"{len(empty):,} samples have no reference with a word in it: {some(empty)}")
        if not samples.answers and part.split != "train":  # captions, or only an evaluation server has them
            if not samples.references:
                self._say("note" if part.split == "test" else "warning", where, "no answers: nothing is scored")
            return
        best = best_answers(samples.scores, samples.offsets)
        unanswered = best < 0
        part.answered = 1 - float(unanswered.mean())
        if part.split == "train":
            self._trained[part.task] = set(compress(samples.answers, samples.scores > 0))
        if unanswered.any():
            ids = list(compress(samples.ids, unanswered))
            trains = part.split == "train"
            level: Level = "failed" if trains and unanswered.all() else "note"
            lacking = "no answer of positive score" + (" and weigh nothing in training" if trains else "")
            self._say(level, where, f"{len(ids):,} of {len(best):,} samples have {lacking}: {some(ids)}")
        counts = Counter(samples.answers[number] for number in best[~unanswered].tolist())
        total = counts.total()
        if not total or TASKS[part.task].score == "cider":  # captions have no small set of answers
            return
        answer, most = counts.most_common(1)[0]
        part.frequent = (answer, most / total)
        if most == total > 1:
            self._say("warning", where, f"every answer is {answer!r}")
        if part.split != "train" and part.task in self._trained:
            trained = self._trained[part.task]
            part.known = sum(count for answer, count in counts.items() if answer in trained) / total

    def _lengths(self, spec: TaskSpec, split: str, samples: Samples, tokenizer: PreTrainedTokenizerBase) -> None:
        prompt = self.data.prompts.get(spec.name, spec.prompt)
        where = f"{spec.name} {split}"
        tokens = self._tokens(where, input_texts(spec, samples, prompt), tokenizer)
        inputs = Lengths(spec.name, split, "input", tokens, spec.max_text)
        self.lengths.append(inputs)
        if split == "train":
            targets = self._tokens(where, samples.answers, tokenizer)
            self.lengths.append(Lengths(spec.name, split, "target", targets, spec.max_target))
        if inputs.cut:
            self._lost(inputs, spec, samples, prompt, tokenizer)

    def _lost(
        self, inputs: Lengths, spec: TaskSpec, samples: Samples, prompt: str, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Report how many inputs lose their prompt or their text by truncation."""
        where, tokens = f"{spec.name} {inputs.split}", inputs.tokens
        cure = ". `data.init_args.truncate: subtitles` cuts nothing else" if samples.subtitles else ""
        if self.data.clips is not None and self.data.clips.short_subtitles:
            samples, cure = replace(samples, subtitles={}), ""  # subtitles are truncated first
            tokens = self._tokens(where, input_texts(spec, samples, prompt), tokenizer)
        lost = lost_by_cutting(spec, samples, prompt, tokenizer, tokens > inputs.limit)
        if lost.prompt or lost.text:
            what = f"{lost.prompt:,} of {len(tokens):,} inputs lose their whole prompt"
            what += f" and {lost.text:,} all of their text" if lost.text else ""
            self._say("warning", where, f"{what}: what is longer than {spec.max_text} tokens is cut at its end{cure}")

    def _tokens(self, title: str, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        bar = self.progress.add_task(f"tokenising {title}", total=None)
        tokens = token_lengths(
            texts, tokenizer, lambda done, total: self.progress.update(bar, completed=done, total=total)
        )
        self.progress.remove_task(bar)
        return tokens

    def _say(self, level: Level, where: str, what: str) -> None:
        self.findings.append(Finding(level, where, what))

    def _failed(self, where: str, error: Exception) -> None:
        what, _, cure = str(error).partition("\n")
        self._say("failed", where, what.removesuffix(" Expected:"))
        if cure:
            self.cures[cure] = None


def check(args: Sequence[str]) -> None:
    """Check the data that `fit` would use with the same arguments; exit with status 1 if a check fails.

    Args:
        args: ``--splits``, ``--checksums``, ``--plot FILE``, ``--help``; all other arguments are those of ``fit``.

    Raises:
        CheckFailed: If a check failed; raised after all checks have run and the report is printed.
        ValueError: If the config has no data module of the benchmark's tasks, or the options are invalid.
    """
    options, words = _options(args)
    data = data_from_config(words)
    if not isinstance(data, BenchmarkDataModule):
        raise ValueError(
            f"cannot check {'a config without `data`' if data is None else type(data).__name__}: set data.class_path "
            "to data_modules.ImageTextDataModule or data_modules.VideoTextDataModule"
        )
    console = Console()
    if not console.is_terminal:  # files have no width
        console.width = max(console.width, WIDTH)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        found = DataCheck(data, options.splits, options.checksums, progress)
        found.run()
    console.print(parts_table(found.parts.values()))
    if found.lengths:
        console.print(lengths_table(found.lengths))
    if found.findings:
        console.print(findings_table(found.findings))
    for cure in found.cures:
        console.print(cure, markup=False, highlight=False, soft_wrap=True)
    if options.plot is not None and found.lengths:
        plot(found.lengths, options.plot)
        console.print(f"written: {options.plot}", soft_wrap=True)
    count = Counter(finding.level for finding in found.findings)
    if count["failed"]:
        raise CheckFailed(f"{count['failed']} checks of {data.root} failed: the findings above say which")
    console.print(f"ready: nothing failed; warnings: {count['warning']}", soft_wrap=True)


def _options(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the arguments into this command's options and the arguments of ``fit``."""
    parser = argparse.ArgumentParser(
        prog="python -m vlpet_lightning data check",
        description="Check a config's data before a run, without loading weights and without training.",
        epilog="Repeat --config to merge files, later ones over earlier ones; any override of fit works here, too.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="a config of fit")
    parser.add_argument(
        "--splits", type=_splits, default=SPLITS, metavar="NAMES", help="splits to check; default: train,val,test"
    )
    parser.add_argument(
        "--checksums",
        type=_bool,
        nargs="?",
        const=True,
        default=False,
        metavar="BOOL",
        help="read all features to compare checksums and to find rows that are not finite or all zero; otherwise only "
        f"the sizes of files and {SAMPLE:,} rows of each store are checked",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the histograms of lengths, as PNG, PDF or SVG")
    known, overrides = parser.parse_known_args(args)
    return known, [word for path in known.config for word in ("--config", path)] + overrides


def _splits(text: str) -> tuple[str, ...]:
    names = text.split(",")
    if not set(names) <= set(SPLITS):
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(SPLITS)}, separated by commas, got {text!r}")
    return tuple(
        split for split in SPLITS if split in names
    )  # training first: the other splits' answers are compared with it


def _bool(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text == "true"
