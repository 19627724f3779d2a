"""Folders of images or videos, and what an encoder sees of each file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from data_modules.extraction.video_frames import frames_of_video
from data_modules.store.frames import fit_clip

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
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
    """Images: a row is the features of one."""

    noun: ClassVar[str] = "images"
    suffixes: ClassVar[tuple[str, ...]] = IMAGES
    at_once: ClassVar[int | None] = None
    has_lengths: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ()

    @property
    def record(self) -> dict[str, Any]:
        """Nothing beside the encoder's."""
        return {}

    def pictures(self, path: Path) -> Iterator[Image.Image]:
        """The image."""
        yield read_image(path)

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


def read_image(path: Path) -> Image.Image:
    """An image in RGB.

    Raises:
        ValueError: If the file holds no image.
        Exception: Whatever Pillow raises for a damaged one.
    """
    content = path.read_bytes()
    try:
        with Image.open(BytesIO(content)) as image:
            image.verify()  # checksums, where the format has them: decoding alone does not look at a PNG's
    except UnidentifiedImageError as error:
        raise ValueError("no image, or one of an unknown format") from error
    with Image.open(BytesIO(content)) as image:
        return image.convert("RGB")
