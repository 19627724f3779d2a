"""``data synthetic``: render a small world of images in the benchmark's formats."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from data_modules.world.benchmark import PARTS, Picture, annotation_files, pictures
from data_modules.world.scenes import render
from data_modules.world.text import text_pairs

RECORD = "world.json"  # written last: a world without it is incomplete
STARTED = ".world-unfinished.json"
VERSION = 1
TEXT_PAIRS = {"train": 48_000, "val": 2_000}


def synthetic(out: Path, seed: int = 0, images: int = 5000) -> None:
    """Render scenes of colored shapes and write them as VQA, GQA, NLVR2 and COCO caption data.

    OUT gets images/STORE/ID.png, the annotation files of the benchmark, and text/ with textual descriptions of the
    world for `pretrain`. The same seed gives the same world, and an existing one is left unchanged.

    Args:
        out: Folder to write.
        seed: Seed of the world.
        images: Total number of images of all tasks and splits, 800 or more.

    Raises:
        ValueError: If there are too few images for every split.
        FileExistsError: If out holds another world, or other data.
    """
    console = Console()
    wanted = {"version": VERSION, "seed": seed, "images": images, "text_pairs": TEXT_PAIRS}
    if is_there(out, wanted):
        console.print(f"{out} is up to date: the same seed and number of images", soft_wrap=True)
        return
    world = pictures(images, Random(f"{seed} scenes"))
    files = annotation_files(world, Random(f"{seed} annotations"))
    out.mkdir(parents=True, exist_ok=True)
    (out / STARTED).write_text(json.dumps(wanted) + "\n")
    _draw(world, out, seed)
    for name, content in files.items():
        write_text(out / name, json.dumps(content))
    for split, count in TEXT_PAIRS.items():
        pairs = text_pairs(count, Random(f"{seed} text {split}"))
        write_text(out / "text" / f"{split}.jsonl", "\n".join(map(json.dumps, pairs)))
    write_text(out / RECORD, json.dumps(wanted, indent=1))
    (out / STARTED).unlink()
    console.print(_summary(files, world))
    console.print(f"written: {out}", soft_wrap=True)


def is_there(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether the folder holds a finished world with these settings.

    Raises:
        FileExistsError: If out holds another world, or other data.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if (out / RECORD).is_file():
        found = json.loads((out / RECORD).read_text())
        if found == wanted:
            return True
        raise FileExistsError(f"{out} holds another world ({found}): choose another --out, or remove it")
    if not (out / STARTED).is_file():
        raise FileExistsError(f"{out} holds other data: choose another --out")
    return False  # an earlier attempt was interrupted: everything is rewritten


def _draw(world: list[Picture], out: Path, seed: int) -> None:
    for part in {part.store for part in PARTS}:
        (out / "images" / part).mkdir(parents=True, exist_ok=True)
    for picture in track(world, description="rendering images"):
        image = render(picture.scene, Random(f"{seed} picture {picture.number}"))
        image.save(out / "images" / picture.part.store / f"{picture.id}.png", compress_level=1)


def write_text(path: Path, text: str) -> None:
    """Write a text with a final newline, creating the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def _summary(files: dict[str, Any], world: list[Picture]) -> Table:
    table = Table(title=f"a world of {len(world)} images")
    table.add_column("file")
    table.add_column("records", justify="right")
    for name, content in sorted(files.items()):
        records: Any = content
        if isinstance(content, dict):
            records = content.get("images") or content.get("annotations") or content
        table.add_row(name, f"{len(records):,}")
    for split, count in TEXT_PAIRS.items():
        table.add_row(f"text/{split}.jsonl", f"{count:,}")
    return table
