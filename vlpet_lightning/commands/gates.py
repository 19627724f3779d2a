"""The ``gates`` command: statistics, heat maps and a page of a checkpoint's gates, or of two side by side."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from vlpet_lightning.atomic_file import check_folder
from vlpet_lightning.batch import Batch
from vlpet_lightning.browse.thumbnails import find_images
from vlpet_lightning.cli import DataOnly, ModelOnly
from vlpet_lightning.commands.export import configs_of, load_checkpoint
from vlpet_lightning.folder_lock import locked_folder
from vlpet_lightning.gates.collecting import Collector
from vlpet_lightning.gates.recording import check_gated
from vlpet_lightning.gates.report import Writer
from vlpet_lightning.gates.results import Result
from vlpet_lightning.module import VLModule
from vlpet_lightning.protocol import file_of, read_record, title_of
from vlpet_lightning.reports.runs import run_names
from vlpet_lightning.run.folder import run_folder
from vlpet_lightning.tasks import TASKS
from vlpet_lightning.vision.images import read_image

STAGES = {"test": "test", "val": "validate"}  # stage of a data module's setup


class Loaded(NamedTuple):
    """A checkpoint in its model, with the data of its config."""

    module: VLModule
    data: Any
    checkpoint: Path


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's own options."""
    found = argparse.ArgumentParser(
        prog="python -m vlpet_lightning gates",
        description="Record the factors G of a checkpoint's gates over a split: statistics and heat maps by task, "
        "site, layer and kind of token, G on images, and a page; of two checkpoints side by side with --against.",
        epilog="Any override that fit takes works here, e.g. --data.init_args.root DIR; with --against, for both.",
        allow_abbrev=False,
    )
    found.add_argument("--ckpt_path", required=True, type=Path, metavar="FILE", help="a checkpoint of fit")
    found.add_argument(
        "--config", action="append", metavar="FILE", help="a config of fit; by default config.yaml in the run's folder"
    )
    found.add_argument("--split", choices=tuple(STAGES), default="test", help="split to read (default: test)")
    found.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: RUN/gates_SPLIT)")
    found.add_argument(
        "--images", type=Path, metavar="DIR", help="folder of the images, <store>/<image id>.png or .jpg"
    )
    found.add_argument("--against", type=Path, metavar="FILE", help="a second checkpoint, for a comparison")
    found.add_argument(
        "--against_config", action="append", metavar="FILE", help="its config; by default the one in its run's folder"
    )
    found.add_argument("--limit", type=int, metavar="N", help="read the first N samples of each task (default: all)")
    found.add_argument(
        "--examples", type=int, default=4, metavar="N", help="images per task with --images (default: 4)"
    )
    found.add_argument("--device", help="device of the model (default: a GPU if there is one)")
    return found


def _check(known: argparse.Namespace) -> None:
    """Refuse files that are missing and numbers that are out of range, before anything is loaded."""
    for option, path in (("--ckpt_path", known.ckpt_path), ("--against", known.against)):
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"no checkpoint at {path} ({option}): give a file of a run's `checkpoints` folder")
    if known.against_config and known.against is None:
        raise ValueError("--against_config belongs to --against: give both, or neither")
    if known.limit is not None and known.limit < 1:
        raise ValueError(f"--limit must be 1 or more, got {known.limit}")
    if known.examples < 1:
        raise ValueError(f"--examples must be 1 or more, got {known.examples}; without --images there are no overlays")
    if known.device is not None and known.device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {known.device}: no GPU can be used here, give cpu")


def _load(checkpoint: Path, configs: Sequence[Path], overrides: Sequence[str], limit: int | None) -> Loaded:
    """Load a checkpoint and check that it has gates, before the data are read."""
    words = [word for path in configs for word in ("--config", str(path))]
    cli = ModelOnly([*words, *overrides], run=False)
    module, seed = cli.model, cli.config.get("seed_everything")
    load_checkpoint(module, checkpoint, seed if isinstance(seed, int) and not isinstance(seed, bool) else None)
    check_gated(module.built())
    data: Any = DataOnly([*words, *overrides], run=False).data
    if data is None:
        raise ValueError(f"the config of {checkpoint} has no data module: give one with --config FILE")
    module.use_data(data)
    if limit is not None and hasattr(data, "limit_eval"):  # reads no more than is needed
        data.limit_eval = limit if data.limit_eval is None else min(limit, data.limit_eval)
    return Loaded(module, data, checkpoint)


def _batches(data: Any, split: str, limit: int | None) -> tuple[Iterator[Batch], int | None]:
    """Return the batches of a data module's evaluation loader, cut to the limit per task, and their number."""
    data.setup(STAGES[split])
    loader = data.test_dataloader() if split == "test" else data.val_dataloader()

    def cut() -> Iterator[Batch]:
        seen: dict[str, int] = {}
        for batch in loader:
            left = len(batch) if limit is None else limit - seen.get(batch.task, 0)
            seen[batch.task] = seen.get(batch.task, 0) + len(batch)
            yield first_samples(batch, max(0, left))

    return cut(), len(loader) if hasattr(loader, "__len__") else None


def first_samples(batch: Batch, count: int) -> Batch:
    """Return a batch of the first ``count`` samples; the batch itself if it has no more."""
    if len(batch) <= count:
        return batch
    parts = {part.name: getattr(batch, part.name) for part in fields(batch) if part.init}
    cut: dict[str, Any] = {name: v[:count] for name, v in parts.items() if isinstance(v, Tensor | list)}
    return replace(batch, **cut)


def _collect(loaded: Loaded, name: str, known: argparse.Namespace, device: str, progress: Progress) -> Result:
    batches, total = _batches(loaded.data, known.split, known.limit)
    model = loaded.module.built().to(device)
    collector = Collector(model, loaded.module.tokenizer, known.examples)
    bar = progress.add_task(f"{name}: batches", total=total)
    for batch in batches:
        if len(batch):
            collector.add(batch.to(device))
        progress.advance(bar)
    model.to("cpu")
    limits = [limit for limit in (known.limit, getattr(loaded.data, "limit_eval", None)) if limit is not None]
    return Result.of(collector, name, {**_about(loaded), "part of the split": part_of(limits)})


def part_of(limits: Sequence[int]) -> str:
    """Describe the part of a split that is read: the limits are the command's and the data module's own."""
    return f"the first {min(limits):,} samples of each task" if limits else "whole"


def _about(loaded: Loaded) -> dict[str, str]:
    described = loaded.module.describe()
    about = {
        "checkpoint": str(loaded.checkpoint),
        "backbone": str(described["backbone"]),
        **{f"unit at {site}": unit for site, unit in described["units"].items()},
        "padding": "hidden from the units" if described["mask_padding"] else "read by the units like any position",
        "computed in": "float32",
    }
    run = run_folder(loaded.checkpoint)
    for stage, name in (("fit", "protocol of the training"), ("test", "protocol of the test")):
        if (record := read_record(run / file_of(stage))) is not None:
            about[name] = f"{title_of(record)}, record {record.get('digest', 'unknown')}"
    return about


def _names(known: argparse.Namespace) -> list[str]:
    """Return the names of the checkpoints: those of their runs, or of their files in one run."""
    paths = [path for path in (known.ckpt_path, known.against) if path is not None]
    runs = [run_folder(path) for path in paths]
    if len(set(runs)) == len(runs):
        return run_names(runs)
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [f"{stem} ({n})" for n, stem in enumerate(stems, start=1)]


def _pictures(
    files: dict[str, Path], results: Sequence[Result], split: str
) -> tuple[dict[str, dict[str, list[Path]]], list[str]]:
    """Return the image files of the examples by task and question id, and notes about those that lack one."""
    found: dict[str, dict[str, list[Path]]] = {}
    missing, unreadable = set(), {}
    for task, example in dict.fromkeys((task, e) for r in results for task, some in r.examples.items() for e in some):
        store = TASKS[task].splits[split].features
        own = [files.get(f"{store}/{image}", files.get(image)) for image in example.images]
        paths = [path for path in own if path is not None]
        if not paths or len(paths) < len(own):
            missing.add((task, example.id))
            continue
        for path in paths:
            try:
                read_image(path)
            except Exception as error:  # Pillow raises many kinds
                unreadable[path] = " ".join(str(error).split())
        if not unreadable.keys() & set(paths):
            found.setdefault(task, {})[example.id] = paths
    notes = [f"{path} cannot be read: {reason}" for path, reason in unreadable.items()]
    return found, ([f"examples without an image file: {len(missing):,}"] if missing else []) + notes


def as_table(result: Result) -> Table:
    """Return the statistics as a table for the terminal."""
    table = Table(title=f"G of {result.name}")
    for name in ("task", "site", "layer", "kind"):
        table.add_column(name)
    for name in ("mean", "std", "near 0", "near 1"):
        table.add_column(name, justify="right")
    last = None
    for row in result.rows():
        if (place := (row["task"], row["site"])) != last and last is not None:
            table.add_section()
        last = place
        shares = (f"{100 * row[name]:.1f} %" for name in ("near_0", "near_1"))
        numbers = (f"{row['mean']:.4f}", f"{row['std']:.4f}", *shares)
        table.add_row(row["task"], row["site"], str(row["layer"]), row["kind"], *numbers)
    return table


def gates(args: Sequence[str]) -> None:
    """Write statistics, figures and a page of a checkpoint's gates.

    Args:
        args: The command's options, see ``--help``; all other arguments are those of ``fit``.

    Raises:
        FolderInUse: If another process writes to ``--out``.
        FileExistsError: If ``--out`` is a file.
        FileNotFoundError: If a checkpoint, its config, the folder of images, the backbone or the data are missing.
        ValueError: If the method has no gates, a checkpoint and its config have different methods, or an option is out
            of range.
    """
    known, overrides = parser().parse_known_args(args)
    _check(known)
    out = known.out or run_folder(known.ckpt_path) / f"gates_{known.split}"
    check_folder(out)
    stores = {split.features for spec in TASKS.values() for split in spec.splits.values()}
    files = {} if known.images is None else find_images(known.images, stores)
    wanted = [(known.ckpt_path, configs_of(known.config, known.ckpt_path))]
    if known.against is not None:
        wanted.append((known.against, configs_of(known.against_config, known.against, "--against_config")))
    loaded = [_load(path, configs, overrides, known.limit) for path, configs in wanted]
    progress = Progress(console=Console(stderr=True), transient=True)
    with locked_folder(out, "the report", "choose another --out"), progress:
        results = _collect_all(loaded, known, progress)
        pictures, notes = _pictures(files, results, known.split) if files else ({}, [])
        if len(results) == 2 and results[0].samples != results[1].samples:
            notes.append("the two checkpoints were run on different numbers of samples")
        bar = progress.add_task("figures and page", total=None)
        writer = Writer(out, known.split, lambda name: progress.update(bar, description=f"written {name}"))
        writer.report(results, pictures, limit=known.limit, notes=notes)
    _print(results, notes, writer)


def _collect_all(loaded: Sequence[Loaded], known: argparse.Namespace, progress: Progress) -> list[Result]:
    device = known.device or ("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    for one, name in zip(loaded, _names(known), strict=True):
        results.append(_collect(one, name, known, device, progress))
        if not results[-1].samples:
            raise ValueError(
                f"the {known.split} split of {one.checkpoint} has no samples: check the limits of its data"
            )
    return results


def _print(results: Sequence[Result], notes: Sequence[str], writer: Writer) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for result in results:
        console.print(as_table(result))
        for site in result.sites:
            console.print(f"{site}: {result.gates[site]}, {result.granularity(site)}")
    for note in notes:
        console.print(note, style="yellow")
    count = sum(path.suffix == ".png" for path in writer.written)
    console.print(f"written: {writer.folder / 'index.html'}, gates.json, gates.csv and {count} figures")
