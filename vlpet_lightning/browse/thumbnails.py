"""Thumbnails of images as data URLs, within a budget of bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from PIL import Image

from vlpet_lightning.vision.images import read_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
SIDES = (160, 112, 72)  # pixels of the longest side; smaller if the page would become too large
QUALITY = 70


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
            if path.parent.name in names:
                found.setdefault(f"{path.parent.name}/{path.stem}", path)
    if not found:
        raise FileNotFoundError(f"--images: no image in {folder}: looked for {', '.join(SUFFIXES)}")
    return found


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


def side_within(paths: Sequence[Path], budget: int, sample: int = 24) -> int:
    """Return the largest side with which thumbnails of these images are expected to stay within a number of bytes."""
    step = max(1, len(paths) // sample)
    for side in SIDES:
        sizes = []
        for path in paths[::step]:
            try:
                sizes.append(len(thumbnail(path, side)))
            except Exception:  # reported when the page is made
                continue
        if not sizes or sum(sizes) / len(sizes) * len(paths) <= budget:
            return side
    return SIDES[-1]


def thumbnails(
    wanted: dict[str, Path], budget: int, advance: Callable[[], None] = lambda: None
) -> tuple[dict[str, str], dict[str, str], int]:
    """Make thumbnails until the budget is used up.

    Args:
        wanted: Files by key, in order of importance.
        budget: Largest total size in bytes.
        advance: Called once per image, for a progress bar.

    Returns:
        Data URLs by key; the reasons of images that could not be read; the number left out for lack of room.
    """
    side = side_within(list(wanted.values()), budget)
    made: dict[str, str] = {}
    problems: dict[str, str] = {}
    used = left_out = 0
    for key, path in wanted.items():
        advance()
        if used >= budget:
            left_out += 1
            continue
        try:
            url = thumbnail(path, side)
        except Exception as error:  # one bad file must not prevent the page
            problems[key] = f"{path.name} cannot be read: {error}"
            continue
        if used + len(url) > budget:
            used = budget
            left_out += 1
            continue
        made[key] = url
        used += len(url)
    return made, problems, left_out
