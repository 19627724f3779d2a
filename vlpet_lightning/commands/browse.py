"""The ``browse`` command: one HTML page with the predictions of one or two runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from vlpet_lightning.atomic_file import atomic_write
from vlpet_lightning.browse.entries import BrowseError, Entry, read_entries
from vlpet_lightning.browse.page import page
from vlpet_lightning.browse.thumbnails import find_images, thumbnails
from vlpet_lightning.tasks import TASKS

SPLITS = {"test": "test", "val": "val", "predict": "test"}  # split whose features a task's predictions were made from


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    found = argparse.ArgumentParser(
        prog="python -m vlpet_lightning browse",
        description="Write one HTML page with images, questions, predictions, true answers and scores of one run, or "
        "of two runs side by side. The page needs no server and no network.",
        allow_abbrev=False,
    )
    found.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a tested run; two to compare them")
    found.add_argument("--out", type=Path, metavar="FILE", help="page to write (default: RUN/browse.html)")
    found.add_argument("--images", type=Path, metavar="DIR", help="folder of the images, {image id}.png or .jpg")
    found.add_argument("--split", choices=tuple(SPLITS), default="test", help="predictions to show (default: test)")
    found.add_argument("--limit", type=int, metavar="N", help="show N evenly spaced questions of each task")
    found.add_argument("--max_mb", type=float, default=20.0, metavar="MB", help="largest size of all thumbnails")
    return found


def evenly_per_task(entries: Sequence[Entry], limit: int | None) -> list[Entry]:
    """Return evenly spaced entries of each task by id, in the order of ``entries``."""
    if limit is None:
        return list(entries)
    kept: set[tuple[str, str]] = set()
    for task in dict.fromkeys(entry.task for entry in entries):
        ids = sorted(entry.id for entry in entries if entry.task == task)
        step = max(1.0, len(ids) / limit)
        kept |= {(task, ids[int(place * step)]) for place in range(min(limit, len(ids)))}
    return [entry for entry in entries if (entry.task, entry.id) in kept]


def _keys(entries: Sequence[Entry], files: dict[str, Path], split: str) -> dict[tuple[str, str], str]:
    """Return the key in ``files`` of each (task, image id) that has a file."""
    found = {}
    for entry in entries:
        store = TASKS[entry.task].splits[SPLITS[split]].features
        for image in entry.images:
            key = next((name for name in (f"{store}/{image}", image) if name in files), None)
            if key is not None:
                found[entry.task, image] = key
    return found


def browse(args: Sequence[str]) -> None:
    """Write a page of predictions.

    Args:
        args: The command's options; see ``--help``.

    Raises:
        BrowseError: If a run has no predictions, or two runs have no task in common.
        FileNotFoundError: If the folder of images does not exist or has none.
        ValueError: If an option is out of range.
    """
    known = parser().parse_args(args)
    if len(known.runs) > 2:
        raise ValueError(f"{len(known.runs)} runs: give one, or two to compare")
    if known.limit is not None and known.limit < 1:
        raise ValueError(f"--limit must be 1 or more, got {known.limit}")
    out = known.out or known.runs[0] / "browse.html"
    if out.is_dir():
        raise BrowseError(f"--out is the folder {out}: give the name of a file")
    stores = {split.features for spec in TASKS.values() for split in spec.splits.values()}
    files = {} if known.images is None else find_images(known.images, stores)  # before the slow part
    every, protocols, notes = read_entries(known.runs, known.split)
    entries = evenly_per_task(every, known.limit)
    if len(entries) < len(every):
        notes.append(f"{len(entries):,} evenly spaced questions of {len(every):,} are shown (--limit {known.limit})")
    keys = _keys(entries, files, known.split)
    wanted = {
        keys[e.task, image]: files[keys[e.task, image]]
        for e in entries
        for image in e.images
        if (e.task, image) in keys
    }
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("thumbnails", total=len(wanted))
        made, problems, left_out = thumbnails(wanted, int(known.max_mb * 1e6), lambda: progress.advance(bar))
    if left_out:
        notes.append(
            f"{left_out:,} of {len(wanted):,} images are left out to keep the page small (--max_mb {known.max_mb:g})"
        )
    names = [run.name for run in known.runs]
    names = names if len(set(names)) == len(names) else [str(run) for run in known.runs]
    content = page(
        entries,
        names,
        split=known.split,
        pictures=made,
        keys=keys,
        problems=problems,
        protocols=protocols,
        notes=notes,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as file:
        file.write(content.encode("utf-8", "replace"))  # lone surrogates
    console = Console()
    for note in notes:
        console.print(note, style="yellow", soft_wrap=True, highlight=False)
    size = out.stat().st_size / 1e6
    console.print(
        f"written: {out} ({len(entries):,} questions, {len(made):,} images, {size:.1f} MB)",
        soft_wrap=True,
        highlight=False,
    )
