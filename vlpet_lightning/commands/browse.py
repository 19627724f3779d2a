"""The ``browse`` command: one HTML page with the predictions of one or two runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from vlpet_lightning.atomic_file import atomic_write, check_folder
from vlpet_lightning.browse.entries import BrowseError, Entry, read_entries
from vlpet_lightning.browse.page import page
from vlpet_lightning.browse.thumbnails import PIXELS, Thumbnails, find_images, spread, thumbnails
from vlpet_lightning.reports.runs import run_names
from vlpet_lightning.tasks import TASKS

MOST_PIXELS = 480
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
    found.add_argument(
        "--pixels", type=int, default=PIXELS, metavar="N", help=f"longest side of the thumbnails (default: {PIXELS})"
    )
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


def by_importance(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries in the order in which they get pictures while there is room.

    All tasks take turns. Entries on which two runs differ come first, in their order; the others follow evenly spread.
    """
    turns = []
    for task in dict.fromkeys(entry.task for entry in entries):
        own = [entry for entry in entries if entry.task == task]
        differing = [entry for entry in own if entry.difference]
        others = [entry for entry in own if not entry.difference]
        turns.append(differing + [others[place] for place in spread(len(others))])
    return [entry for turn in zip_longest(*turns) for entry in turn if entry is not None]


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


def _picture_notes(made: Thumbnails, wanted: int, missing: int, known: argparse.Namespace) -> list[str]:
    """Return what the reader must know about the pictures."""
    notes = []
    if missing:
        notes.append(f"images without a file in {known.images}: {missing:,}")
    if made.side < known.pixels:
        notes.append(f"thumbnails have {made.side} pixels to keep the page small (--max_mb {known.max_mb:g})")
    if made.left_out:
        notes.append(
            f"{made.left_out:,} of {wanted:,} images are left out to keep the page small (--max_mb {known.max_mb:g}); "
            "the others are spread evenly over the tasks"
        )
    if made.problems:
        notes.append(f"images that cannot be read: {len(made.problems):,}; the reasons stand in their places")
    return notes


def _check(known: argparse.Namespace, out: Path) -> None:
    """Refuse options that are out of range."""
    if len(known.runs) > 2:
        raise ValueError(f"{len(known.runs)} runs: give one, or two to compare")
    if known.limit is not None and known.limit < 1:
        raise ValueError(f"--limit must be 1 or more, got {known.limit}")
    if not 0 < known.max_mb < float("inf"):
        raise ValueError(f"--max_mb must be above 0, got {known.max_mb:g}; without --images, the page has no pictures")
    if not 16 <= known.pixels <= MOST_PIXELS:
        raise ValueError(f"--pixels must be from 16 to {MOST_PIXELS}, got {known.pixels}")
    if out.is_dir():
        raise BrowseError(f"--out is the folder {out}: give the name of a file")
    check_folder(out.parent)


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
    out = known.out or known.runs[0] / "browse.html"
    _check(known, out)
    stores = {split.features for spec in TASKS.values() for split in spec.splits.values()}
    files = {} if known.images is None else find_images(known.images, stores)  # before the slow part
    with Progress(console=Console(stderr=True), transient=True) as progress:
        reading = progress.add_task("predictions", total=None)
        every, protocols, notes = read_entries(
            known.runs, known.split, lambda done, total: progress.update(reading, completed=done, total=total)
        )
        entries = evenly_per_task(every, known.limit)
        if len(entries) < len(every):
            notes.append(
                f"{len(entries):,} evenly spaced questions of {len(every):,} are shown (--limit {known.limit})"
            )
        keys = _keys(entries, files, known.split)
        images = [(entry.task, image) for entry in by_importance(entries) for image in entry.images]
        wanted = {keys[image]: files[keys[image]] for image in images if image in keys}
        bar = progress.add_task("thumbnails", total=len(wanted))
        made = thumbnails(wanted, int(known.max_mb * 1e6), known.pixels, lambda: progress.advance(bar))
    if known.images is not None:
        notes += _picture_notes(made, len(wanted), len(set(images) - keys.keys()), known)
    content = page(
        entries,
        run_names(known.runs),
        split=known.split,
        pictures=made.urls,
        keys=keys,
        problems=made.problems,
        side=made.side,
        protocols=protocols,
        notes=notes,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as file:
        file.write(content.encode("utf-8", "replace"))  # lone surrogates
    console = Console()
    for note in notes:
        console.print(note, style="yellow", soft_wrap=True, highlight=False, markup=False)
    size = out.stat().st_size / 1e6
    console.print(
        f"written: {out} ({len(entries):,} questions, {len(made.urls):,} images, {size:.1f} MB)",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
