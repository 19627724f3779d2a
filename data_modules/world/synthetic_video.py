"""``data synthetic-video``: render a small world of clips in the formats of the VALUE benchmark."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data_modules.store.writer import FeatureWriter
from data_modules.world.clips import FRAMES, SECONDS, film_strip, frames_of
from data_modules.world.synthetic import RECORD, STARTED, is_there, write_text
from data_modules.world.value import Film, annotation_files, films, text_pairs
from vlpet_lightning.vision.encoders import CALIBRATION, Encoder, EncoderSettings, evenly

VERSION = 1
TEXT_PAIRS = {"train": 48_000, "val": 1_600}
AT_ONCE = 16  # clips encoded per batch


def synthetic_video(
    out: Path,
    seed: int = 0,
    clips: int = 1500,
    model: str = "experiments/clip/tiny_rn.json",
    pretrained: str | None = None,
) -> None:
    """Render clips of moving colored shapes and write them as TVQA, How2QA, TVC and YC2C data with their features.

    OUT gets the annotation files of the benchmark, features/STORE with one vector per frame, images/STORE/ID.png with
    the frames of a clip side by side, and text/ with textual descriptions of the world for `pretrain`. The same seed
    gives the same world, and an existing one is left unchanged. Unlike the benchmark's, the test splits have answers.

    Args:
        out: Folder to write.
        seed: Seed of the world.
        clips: Total number of clips of all tasks and splits, 200 or more.
        model: Name of an open_clip model, or JSON file with an architecture, to encode the frames.
        pretrained: Tag or file of its weights; null for random weights.

    Raises:
        ValueError: If there are too few clips for every split, or there is no such model or weights.
        FileExistsError: If out holds another world, or other data.
        FileNotFoundError: If the model or its weights are not available locally.
    """
    console = Console()
    wanted = {"version": VERSION, "seed": seed, "clips": clips, "text_pairs": TEXT_PAIRS}
    wanted |= {"model": model, "pretrained": pretrained}
    if is_there(out, wanted):
        console.print(f"{out} is up to date: the same seed, number of clips and model", soft_wrap=True)
        return
    world = films(clips, Random(f"{seed} clips"))
    encoder = Encoder(EncoderSettings(model, pretrained, pool=1, seed=seed))
    files = annotation_files(world, Random(f"{seed} annotations"))
    out.mkdir(parents=True, exist_ok=True)
    (out / STARTED).write_text(json.dumps(wanted) + "\n")
    _calibrate(encoder, world, seed)
    for store in dict.fromkeys(film.part.store for film in world):
        _encode([film for film in world if film.part.store == store], out, store, encoder, seed)
    for name, records in files.items():
        write_text(out / name, "\n".join(map(json.dumps, records)))
    for split, count in TEXT_PAIRS.items():
        pairs = text_pairs(count, Random(f"{seed} text {split}"))
        write_text(out / "text" / f"{split}.jsonl", "\n".join(map(json.dumps, pairs)))
    write_text(out / RECORD, json.dumps(wanted, indent=1))
    (out / STARTED).unlink()
    console.print(_summary(files, world))
    console.print(f"written: {out}", soft_wrap=True)


def _pictures(film: Film, seed: int) -> list[Image.Image]:
    return frames_of(film.clip, Random(f"{seed} frames {film.id}"))


def _calibrate(encoder: Encoder, world: Sequence[Film], seed: int) -> None:
    """Calibrate the statistics of a randomly initialised encoder on some frames."""
    chosen = [film for film in world if film.part.split == "train"][: CALIBRATION // 4]
    encoder.calibrate([encoder.pixels(picture) for picture in evenly([p for f in chosen for p in _pictures(f, seed)])])


def _encode(world: Sequence[Film], out: Path, store: str, encoder: Encoder, seed: int) -> None:
    folder = out / "images" / store
    folder.mkdir(parents=True, exist_ok=True)
    record = {**encoder.record, "frames": FRAMES, "seconds_per_frame": SECONDS}
    features = out / "features" / store
    (features / "meta.json").unlink(missing_ok=True)  # left by an interrupted attempt
    with FeatureWriter(features, tokens=FRAMES, dim=encoder.dim, extractor=record) as writer:
        for batch in track(_batches(world), description=f"rendering {store}", total=-(-len(world) // AT_ONCE)):
            pictures = [_pictures(film, seed) for film in batch]
            for film, frames in zip(batch, pictures, strict=True):
                film_strip(frames).save(folder / f"{film.id}.png", compress_level=1)
            vectors = encoder(torch.stack([encoder.pixels(frame) for frames in pictures for frame in frames]))
            writer.add([film.id for film in batch], _padded(vectors[:, 0].numpy(), [len(p) for p in pictures]))


def _batches(world: Sequence[Film]) -> Iterator[Sequence[Film]]:
    for start in range(0, len(world), AT_ONCE):
        yield world[start : start + AT_ONCE]


def _padded(vectors: np.ndarray, lengths: Iterable[int]) -> np.ndarray:
    """Pad the vectors of clips with zeros to ``(clips, FRAMES, dim)``."""
    lengths = list(lengths)
    rows = np.zeros((len(lengths), FRAMES, vectors.shape[1]), dtype=np.float32)
    start = 0
    for place, length in enumerate(lengths):
        rows[place, :length] = vectors[start : start + length]
        start += length
    return rows


def _summary(files: dict[str, list[dict[str, Any]]], world: Sequence[Film]) -> Table:
    table = Table(title=f"a world of {len(world):,} clips, {sum(film.clip.frames for film in world):,} frames")
    table.add_column("file")
    table.add_column("records", justify="right")
    for name, records in files.items():
        table.add_row(name, f"{len(records):,}")
    for split, count in TEXT_PAIRS.items():
        table.add_row(f"text/{split}.jsonl", f"{count:,}")
    return table
