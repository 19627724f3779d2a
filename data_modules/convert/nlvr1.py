"""``data convert nlvr1``: the NLVR corpus (Suhr et al. 2017; lil-lab/nlvr, folder ``nlvr``) in the NLVR2 format.

A picture of the corpus is 400 x 100: three boxes of 100 x 100, separated by dividers of 50 x 100. NLVR2 has two images
per statement, each resized to a square when it is encoded. ``img0`` is the left 250 columns: box 1, divider, box 2.
``img1`` is the right 250 columns with box 2 painted over in the divider's grey, so that box 3 is at the position of
box 2 in ``img0``. Each box is therefore shown completely and exactly once, and resizing distorts all boxes alike.
("exactly three circles" is a count over both images: overlapping crops would show box 2 twice, halves would cut it.)
It matters little which boxes share an image, because each statement comes with six orders of its boxes. Images are
named by a hash of their pixels, and duplicates are stored once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections import defaultdict
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from data_modules.annotations.image_text import AnnotationError
from data_modules.convert.denoising import denoising_lines
from vlpet_lightning.tasks import TASKS

COPIES = 40  # examples per statement in the text for `pretrain`
ORDERS = 6  # dev-N-M-0.png to dev-N-M-5.png
SIZE, LEFT, RIGHT = (400, 100), (0, 0, 250, 100), (150, 0, 400, 100)
TREE = """\
{source}/
  dev/   dev.json   images/DIRECTORY/dev-N-M-K.png    (or dev.zip)
  test/  test.json  images/DIRECTORY/test-N-M-K.png   (or test.zip)
Both are in the folder nlvr of https://github.com/lil-lab/nlvr"""

Folder = Path | zipfile.Path  # folder that contains dev.json or test.json
Record = dict[str, Any]


def convert_nlvr1(*, source: Path, out: Path, valid_share: float = 0.1, seed: int = 0) -> None:
    """Convert the NLVR corpus to NLVR2 data: nlvr/train.json, valid.json, test.json and images/nlvr/ID.png.

    The statements of train and valid are also written to text/train.jsonl and val.jsonl, for `pretrain`.

    The corpus' dev part is divided into train and valid, with no sentence or picture in common; its test part becomes
    test. As in its own evaluation (metrics_images.py), each of the six orders of a statement's boxes counts as one
    sample, and consistency requires all pictures of a sentence to be right.

    Args:
        source: Folder with the parts dev and test, unpacked or as zip files (which are not unpacked).
        out: Folder to write.
        valid_share: Share of dev that becomes valid, between 0 and 1.
        seed: Seed of the choice of valid.

    Raises:
        FileNotFoundError: If a part or a picture is missing.
        AnnotationError: If a line, a picture or a zip file cannot be used.
        FileExistsError: If out holds other annotations.
        ValueError: If valid_share leaves valid empty, or source holds a part twice.
    """
    if not 0 < valid_share < 1 or out.is_file():
        raise ValueError(f"valid_share must lie between 0 and 1, out be a folder: got {valid_share} and {out}")
    images: dict[str, bytes] = {}
    with ExitStack() as stack:
        folders = _open_parts(source, stack)
        pictures = {part: _pictures(folder, part) for part, folder in folders.items()}
        dev, test = [_records(folders[part], pictures[part], part, images) for part in folders]
    train, valid = _split(dev, valid_share, seed)
    # train.json is written last, so that an incomplete folder cannot be trained on
    splits = {"test": test, "valid": valid, "train": train}
    files = {out / "text" / f"{split}.jsonl": _text(rows, seed) for split, rows in (("train", train), ("val", valid))}
    files |= {out / "nlvr" / f"{split}.json": json.dumps(rows, indent=1).encode() for split, rows in splits.items()}
    if other := [path for path, content in files.items() if path.exists() and path.read_bytes() != content]:
        given = f"valid_share {valid_share} and seed {seed}"
        raise FileExistsError(f"{other[0]} is not what {source} with {given} gives: choose another --out, or remove it")
    pngs = {out / "images" / "nlvr" / f"{id}.png": content for id, content in images.items()}
    written = sum(_write(*png) for png in track(pngs.items(), description="writing images"))
    written += sum(_write(*file) for file in files.items())
    if written:
        Console().print(_summary(splits))
    Console().print(f"written: {out}" if written else f"{out} is up to date: nothing was written", soft_wrap=True)


def _text(records: list[Record], seed: int) -> bytes:
    """Denoising examples of the statements, to teach a language model their words if no pretrained one is available."""
    return denoising_lines((record["sent"] for record in records), TASKS["nlvr2"].prompt, COPIES, seed).encode()


def _split(records: list[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Divide records into train and valid, with no sentence or picture in common."""
    groups = _groups(records)
    Random(seed).shuffle(groups)
    chosen: set[str] = set()
    for group in groups:
        if len(chosen) + len(group) <= share * len(records):
            chosen.update(group)
    if not chosen:
        has = f"dev has {len(records)} pictures in {len(groups)} groups of {min(map(len, groups))} or more"
        raise ValueError(f"valid_share {share} leaves valid empty: {has}")
    train, valid = ([r for r in records if (r["uid"] in chosen) == held_out] for held_out in (False, True))
    return train, valid


def _groups(records: list[Record]) -> list[list[str]]:
    parent: dict[Any, Any] = {}

    def root(key: Any) -> Any:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    # records in one group share the sentence number, the words or the picture
    keys = [(int(r["uid"].split("-")[1]), _words(r), (r["img0"], r["img1"])) for r in records]
    for number, words, picture in keys:
        parent[root(words)] = root(number)
        parent[root(picture)] = root(number)
    groups: dict[Any, list[str]] = defaultdict(list)
    for record, (number, *_) in zip(records, keys, strict=True):
        groups[root(number)].append(record["uid"])
    return list(groups.values())


def _words(record: Record) -> str:
    return " ".join(re.findall(r"\w+", record["sent"].casefold()))


def _open_parts(source: Path, stack: ExitStack) -> dict[str, Folder]:
    found: dict[str, list[Path]] = {}
    for part in ("dev", "test"):
        unpacked = [path for path in _below(source, f"{part}.json") if (path.parent / "images").is_dir()]
        found[part] = unpacked or _below(source, f"{part}.zip")
    missing = [part for part, paths in found.items() if not paths]
    if missing:
        wanted = f"no {' and no '.join(missing)} part of the NLVR corpus in {source}. Expected:\n"
        raise FileNotFoundError(wanted + TREE.format(source=source))
    several = [str(path) for paths in found.values() if len(paths) > 1 for path in paths]
    if several:
        raise ValueError(f"{source} has more than one of a part, name a folder with one of each: {', '.join(several)}")
    return {part: _open(path, part, stack) for part, (path,) in found.items()}


def _below(source: Path, name: str) -> list[Path]:
    return [path for depth in range(4) for path in sorted(source.glob("*/" * depth + name)) if path.is_file()]


def _open(path: Path, part: str, stack: ExitStack) -> Folder:
    if path.suffix == ".json":
        return path.parent
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
    except Exception as error:
        raise AnnotationError(f"{path} is no whole zip ({error}): fetch it again") from error
    files = [name for name in archive.namelist() if name.split("/")[-1] == f"{part}.json"]
    if len(files) != 1:
        raise AnnotationError(f"{path} has {len(files)} files {part}.json instead of one: it is not the NLVR corpus")
    return zipfile.Path(archive, files[0].removesuffix(f"{part}.json"))


def _pictures(folder: Folder, part: str) -> dict[str, Record]:
    """Read the records of a part's pictures, by picture name ``PART-N-M-K``; ``file`` is the picture's path."""
    path = folder / f"{part}.json"
    try:
        lines = path.read_bytes().split(b"\n")
    except Exception as error:  # anything that zipfile and zlib raise for a damaged zip
        raise AnnotationError(f"{path} cannot be read ({error}): fetch it again") from error
    pictures: dict[str, Record] = {}
    for number, line in enumerate(lines, 1):
        try:
            new = _line(json.loads(line), part) if line.strip() else {}
        except (KeyError, ValueError) as error:
            problem = f"the field {error} is missing" if isinstance(error, KeyError) else error
            raise AnnotationError(f"{path}, line {number}: {problem}") from error
        if not new.keys().isdisjoint(pictures):
            raise AnnotationError(f"{path}, line {number}: its identifier came before")
        pictures |= new
    missing = [said["file"] for said in pictures.values() if not (folder / said["file"]).is_file()]
    if missing or not pictures:
        some = ", ".join(missing[:3]) or "it has no lines"
        raise FileNotFoundError(f"{len(missing)} of {len(pictures)} pictures of {path} are missing: {some}")
    return pictures


def _line(line: Any, part: str) -> dict[str, Record]:
    if not isinstance(line, dict):
        raise ValueError(f"it must be a JSON object, got {line!r}")
    sentence, label, name, directory = (str(line[key]) for key in ("sentence", "label", "identifier", "directory"))
    if label.lower() not in ("true", "false"):
        raise ValueError(f"label must be true or false, got {label!r}")
    if not re.fullmatch("[0-9]+-[0-9]+", name) or not re.fullmatch("[0-9]+", directory):  # they become part of a path
        raise ValueError(f"identifier must read N-M and directory be a number, got {name!r} and {directory!r}")
    if not isinstance(line["sentence"], str) or not sentence.strip():
        raise ValueError(f"sentence must be text, got {line['sentence']!r}")
    names = [f"{part}-{name}-{order}" for order in range(ORDERS)]
    said = {"sent": sentence.strip(), "label": int(label.lower() == "true")}
    return {picture: {"file": f"images/{directory}/{picture}.png", **said} for picture in names}


def _records(folder: Folder, pictures: dict[str, Record], part: str, images: dict[str, bytes]) -> list[Record]:
    """Create the NLVR2 records of a part, and add their images to ``images`` (PNG by id)."""
    records = []
    for uid, said in track(pictures.items(), description=f"reading {part}"):
        _, n, m, k = uid.split("-")
        img0, img1 = [_add(image, images) for image in _halves(folder / said.pop("file"))]
        # NLVR2's split-set-pair-sentence: consistency is over records that differ only in the third field
        records.append({"uid": uid, "identifier": f"{part}-{n}-{m}{k}-0", "img0": img0, "img1": img1, **said})
    return records


def _halves(file: Folder) -> tuple[Image.Image, Image.Image]:
    try:
        content = BytesIO(file.read_bytes())
        Image.open(content, formats=("PNG",)).verify()  # decoding alone does not verify checksums
        picture = Image.open(content, formats=("PNG",)).convert("RGB")
    except Exception as error:  # anything that zipfile, zlib and Pillow raise for a damaged file
        raise AnnotationError(f"{file} cannot be read ({error}): fetch it again") from error
    if picture.size != SIZE:
        raise AnnotationError(f"{file} has {picture.width} x {picture.height} pixels: the corpus' have 400 x 100")
    right = picture.crop(RIGHT)
    right.paste((128, 128, 128), (0, 0, 100, 100))  # box 2, in the divider's grey
    return picture.crop(LEFT), right


def _add(image: Image.Image, images: dict[str, bytes]) -> str:
    id = f"nlvr1-{hashlib.sha256(image.tobytes()).hexdigest()[:16]}"
    if id not in images:
        image.save(png := BytesIO(), "PNG")
        images[id] = png.getvalue()
    return id


def _write(path: Path, content: bytes) -> bool:
    """Write a file atomically unless it exists with this content; returns whether it was written."""
    if path.is_file() and path.read_bytes() == content:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
    return True


def _summary(splits: dict[str, list[Record]]) -> Table:
    shown = {split: {(record["img0"], record["img1"]) for record in records} for split, records in splits.items()}
    numbers = [Column(name, justify="right") for name in ("sentences", "statements", "pictures", "majority", "images")]
    caption = f"{len(shown['test'] & (shown['train'] | shown['valid']))} pictures of test are also in the dev part"
    table = Table("split", *numbers, title="the NLVR corpus", caption=caption)
    for split, records in reversed(splits.items()):
        true = sum(record["label"] for record in records) / len(records)
        sentences, images = {_words(record) for record in records}, {id for pair in shown[split] for id in pair}
        counts = [f"{count:,}" for count in (len(sentences), len(records) // ORDERS, len(records))]
        majority = f"{max(true, 1 - true):.1%} {'true' if true >= 0.5 else 'false'}"
        table.add_row(split, *counts, majority, f"{len(images):,}")
    return table
