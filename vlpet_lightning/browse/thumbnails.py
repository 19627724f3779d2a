"""Thumbnails of images as data URLs, within a budget of bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from vlpet_lightning.vision.images import read_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
PIXELS = 160  # of the longest side
SMALLER = (1.0, 0.7, 0.45)  # sides that are tried if the page would become too large
QUALITY = 70


class Thumbnails(NamedTuple):
    """Result of :func:`thumbnails`.

    Args:
        urls: Data URLs by key.
        problems: Reasons of images that could not be read, by key.
        left_out: Number of images left out for lack of room.
        side: Pixels of the longest side.
    """

    urls: dict[str, str]
    problems: dict[str, str]
    left_out: int
    side: int


def find_images(folder: Path, stores: Iterable[str] = ()) -> dict[str, Path]:
    """Return the image files below a folder by their ids; a file below ``<store>/`` also by ``<store>/<id>``.

    Raises:
        FileNotFoundError: If there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--images: there is no folder {folder}")
    found: dict[str, Path] = {}
    names = set(stores)
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES:
            found.setdefault(path.stem, path)
            for store in names.intersection(path.parent.parts):
                found.setdefault(f"{store}/{path.stem}", path)
    if not found:
        raise FileNotFoundError(f"--images: no image in {folder}: looked for {', '.join(SUFFIXES)}")
    return found


def spread(count: int) -> list[int]:
    """Return the numbers below ``count`` in an order of which every beginning is spread evenly over all of them.

    >>> spread(8)
    [0, 4, 2, 6, 1, 5, 3, 7]
    """
    bits = max(1, (count - 1).bit_length())
    reversed_bits = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(2**bits))
    return [number for number in reversed_bits if number < count]


def thumbnail(path: Path, side: int) -> str:
    """Return an image as a data URL of a JPEG.

    Args:
        path: Image file.
        side: Pixels of its longest side.

    Raises:
        Exception: Any error that Pillow raises for an unreadable file.
    """
    picture = read_image(path)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def side_within(paths: Sequence[Path], budget: int, largest: int = PIXELS, sample: int = 24) -> int:
    """Return the largest side with which thumbnails of these images are expected to stay within a number of bytes."""
    step = max(1, len(paths) // sample)
    sides = [max(1, round(largest * factor)) for factor in SMALLER]
    for side in sides:
        sizes = []
        for path in paths[::step]:
            try:
                sizes.append(len(thumbnail(path, side)))
            except Exception:  # reported when the page is made
                continue
        if not sizes or sum(sizes) / len(sizes) * len(paths) <= budget:
            return side
    return sides[-1]


def thumbnails(
    wanted: dict[str, Path], budget: int, largest: int = PIXELS, advance: Callable[[], None] = lambda: None
) -> Thumbnails:
    """Make thumbnails until the budget is used up.

    Args:
        wanted: Files by key, in order of importance.
        budget: Largest total size in bytes.
        largest: Pixels of the longest side; smaller if the budget requires it.
        advance: Called once per image, for a progress bar.
    """
    side = side_within(list(wanted.values()), budget, largest)
    made: dict[str, str] = {}
    problems: dict[str, str] = {}
    left_out = 0
    room = budget
    for key, path in wanted.items():
        advance()
        if left_out:  # a smaller image later in the order is not more important
            left_out += 1
            continue
        try:
            url = thumbnail(path, side)
        except Exception as error:  # one bad file must not prevent the page
            problems[key] = f"{path.name} cannot be read: {error}"
            continue
        if len(url) > room:
            left_out += 1
            continue
        made[key] = url
        room -= len(url)
    return Thumbnails(made, problems, left_out, side)
