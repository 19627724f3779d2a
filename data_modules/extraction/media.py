"""Folders of images or videos, and the pictures that an encoder gets from each file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_modules.extraction.video_frames import frames_of_video
from data_modules.store.frames import fit_clip

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SEVERAL_FRAMES = (".gif", ".tif", ".tiff", ".webp")  # formats that hold more than one picture
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # modes of Pillow with more than 8 bits a pixel
VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".ogv")


class UnusableFiles(ValueError):
    """Files that cannot be extracted; names them and the cure."""


class Media(Protocol):
    """A kind of files, and how one becomes a row of a store."""

    noun: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    at_once: ClassVar[int | None]  # files that are decoded together; None for as many as are encoded together
    has_lengths: ClassVar[bool]  # whether rows were padded or pooled to one length
    packages: ClassVar[tuple[str, ...]]  # that decode, beside Pillow

    @property
    def record(self) -> dict[str, Any]:
        """What a store says of how files are read."""

    def pictures(self, path: Path) -> Iterator[Image.Image]:
        """What the encoder sees of a file, in RGB; any exception means that the file cannot be read."""

    def tokens(self, tokens: int) -> int:
        """Tokens of a row, from those of a picture."""

    def row(self, features: np.ndarray) -> np.ndarray:
        """A row from ``(pictures, tokens, dim)`` float16."""


@dataclass(frozen=True)
class Images:
    """Images: a row is the features of one.

    Args:
        exif_orientation: Turn an image as its EXIF orientation says, which viewers do. Off, its pixels are encoded as
            they are stored: the published features were made so.
    """

    exif_orientation: bool = True

    noun: ClassVar[str] = "images"
    suffixes: ClassVar[tuple[str, ...]] = IMAGES
    at_once: ClassVar[int | None] = None
    has_lengths: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ()

    @property
    def record(self) -> dict[str, Any]:
        """How pixels are made from files."""
        return {
            "exif_orientation": self.exif_orientation,
            "transparency": "composited over white",
            "more_than_8_bits": "scaled by each image's own range",
            "frame": "first",
        }

    def pictures(self, path: Path) -> Iterator[Image.Image]:
        """The image."""
        yield read_image(path, exif_orientation=self.exif_orientation)

    def tokens(self, tokens: int) -> int:
        """Those of the picture."""
        return tokens

    def row(self, features: np.ndarray) -> np.ndarray:
        """The features of the one picture."""
        return features[0]


@dataclass(frozen=True)
class Videos:
    """Videos: a row is one vector a frame, ``frames`` of them.

    Args:
        seconds: Between two frames that are looked at.
        frames: Of a row: shorter videos get zeros, longer ones are max-pooled over time.
    """

    seconds: float
    frames: int
    noun: ClassVar[str] = "videos"
    suffixes: ClassVar[tuple[str, ...]] = VIDEOS
    at_once: ClassVar[int | None] = 2
    has_lengths: ClassVar[bool] = True
    packages: ClassVar[tuple[str, ...]] = ("av",)

    @property
    def record(self) -> dict[str, Any]:
        """How frames are chosen."""
        return {"seconds_per_frame": self.seconds, "frame": "shown at that time", "frames": self.frames}

    def pictures(self, path: Path) -> Iterator[Image.Image]:
        """The frames shown at 0, 1, 2 ... times ``seconds``."""
        return frames_of_video(path, Fraction(str(self.seconds)))

    def tokens(self, tokens: int) -> int:
        """One a frame."""
        return self.frames

    def row(self, features: np.ndarray) -> np.ndarray:
        """The vectors of all frames, padded or pooled."""
        return fit_clip(features[:, 0], self.frames)


def find_files(folder: Path, media: Media) -> dict[str, Path]:
    """The files of a kind in a folder and below, by id: the file's name without its suffix.

    Raises:
        FileNotFoundError: If there is no such folder, or no such file in it.
        UnusableFiles: If two files have the same id.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give --source the folder that the {media.noun} lie in")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in media.suffixes and path.is_file())
    if not paths:
        raise FileNotFoundError(f"no {media.noun} in {folder}: looked for {', '.join(media.suffixes)}")
    found: dict[str, Path] = {}
    for path in paths:
        earlier = found.setdefault(path.stem, path)
        if earlier is not path:
            raise UnusableFiles(f"{earlier} and {path} have the same id {path.stem!r}: rename or remove one")
    return found


def other_suffixes(folder: Path, media: Media) -> Counter[str]:
    """Count the files of a folder, and of folders below, that are not of a kind, by their suffix."""
    others = (path for path in folder.rglob("*") if path.suffix.lower() not in media.suffixes and path.is_file())
    return Counter(path.suffix.lower() or "without a suffix" for path in others)


def several_frames(paths: Iterable[Path]) -> list[Path]:
    """The images that hold more than one frame; unreadable files are not among them."""
    found = []
    for path in paths:
        if path.suffix.lower() in SEVERAL_FRAMES:
            try:
                with Image.open(path) as image:
                    count = getattr(image, "n_frames", 1)
            except Exception:  # reported when its pixels are read
                continue
            if count > 1:
                found.append(path)
    return found


def read_image(path: Path, *, exif_orientation: bool = True) -> Image.Image:
    """Read the first frame of an image file in 8-bit RGB.

    Images of more than 8 bits are scaled by their own range of values; transparent ones are composited over white.

    Args:
        path: An image file.
        exif_orientation: Turn the image as its EXIF orientation says.

    Raises:
        ValueError: If the file holds no image, or values that are not finite.
        Exception: Whatever Pillow raises for a damaged one.
    """
    content = path.read_bytes()
    try:
        with Image.open(BytesIO(content)) as image:
            image.verify()  # checksums, where the format has them: decoding alone does not look at a PNG's
    except UnidentifiedImageError as error:
        raise ValueError("no image, or one of an unknown format") from error
    with Image.open(BytesIO(content)) as opened:
        picture = ImageOps.exif_transpose(opened) if exif_orientation else opened
        if picture.mode in DEEP:
            return _to_8_bits(picture).convert("RGB")
        if picture.has_transparency_data:
            layer = picture.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
        return picture.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale values to 0 .. 255 by their smallest and largest; an image of one value by the range of its type."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has values that are not finite")
    low, high = values.min(), values.max()
    if low == high:
        low, high = 0.0, 1.0 if image.mode == "F" else 2.0**16 - 1
    scaled = 255 * (values - low) / (high - low)
    return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))
