"""Image and video files: finding them in folders and decoding them into pictures for an encoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image

from data_modules.extraction.video_frames import frames_of_video
from data_modules.store.frames import CLIP_IMAGES, fit_clip
from vlpet_lightning.vision.images import read_image

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SEVERAL_FRAMES = (".gif", ".tif", ".tiff", ".webp")  # formats that can hold more than one frame
VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".ogv")


class UnusableFiles(ValueError):
    """Files that cannot be extracted; the message names them and the cure."""


class Media(Protocol):
    """Kind of files, and their conversion to rows of a store."""

    noun: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    at_once: ClassVar[int | None]  # number of files decoded together; None for the encoding batch size
    has_lengths: ClassVar[bool]  # whether rows are padded or pooled to a common length
    packages: ClassVar[tuple[str, ...]]  # packages that decode the files, besides Pillow

    @property
    def record(self) -> dict[str, Any]:
        """Description of the decoding, for the store's ``meta.json``."""

    def pictures(self, path: Path) -> Iterator[Image.Image]:
        """Decode the pictures of a file for the encoder, in RGB; any exception means that the file is unreadable."""

    def tokens(self, tokens: int) -> int:
        """Return the number of tokens per row, given that of a picture."""

    def row(self, features: np.ndarray) -> np.ndarray:
        """Build a row from ``(pictures, tokens, dim)`` float16."""


@dataclass(frozen=True)
class Images:
    """Images: each row holds the features of one image.

    Args:
        exif_orientation: Apply an image's EXIF orientation, as viewers do. If off, the stored pixels are encoded; the
            published features were made this way.
    """

    exif_orientation: bool = True

    noun: ClassVar[str] = "images"
    suffixes: ClassVar[tuple[str, ...]] = IMAGES
    at_once: ClassVar[int | None] = None
    has_lengths: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ()

    @property
    def record(self) -> dict[str, Any]:
        """Conversion of files to pixels."""
        return {
            "exif_orientation": self.exif_orientation,
            "transparency": "composited over white",
            "more_than_8_bits": "scaled by each image's own range",
            "frame": "first",
        }

    def pictures(self, path: Path) -> Iterator[Image.Image]:
        """Decode the image."""
        yield read_image(path, exif_orientation=self.exif_orientation)

    def tokens(self, tokens: int) -> int:
        """Return the number of tokens of a picture."""
        return tokens

    def row(self, features: np.ndarray) -> np.ndarray:
        """Return the features of the only picture."""
        return features[0]


@dataclass(frozen=True)
class Videos:
    """Videos: each row holds one vector per frame, ``frames`` vectors in all.

    Args:
        seconds: Interval between encoded frames.
        frames: Number of vectors per row; shorter videos are padded with zeros, longer ones are max-pooled over time.
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
        """Choice of frames."""
        return {"seconds_per_frame": self.seconds, "frame": "shown at that time", "frames": self.frames}

    def pictures(self, path: Path) -> Iterator[Image.Image]:
        """Decode the frames shown at 0, 1, 2 ... times ``seconds``."""
        return frames_of_video(path, Fraction(str(self.seconds)))

    def tokens(self, tokens: int) -> int:
        """Return the number of vectors per row, one per frame."""
        return self.frames

    def row(self, features: np.ndarray) -> np.ndarray:
        """Pad or pool the vectors of all frames to a row."""
        return fit_clip(features[:, 0], self.frames)


@dataclass(frozen=True)
class SpacedFrames(Videos):
    """Videos for models that read several images: each row holds the features of ``frames`` evenly spaced frames.

    Of the frames at a regular rate, those in the middle of ``frames`` equal parts are taken; short videos repeat some.
    """

    has_lengths: ClassVar[bool] = False

    @property
    def record(self) -> dict[str, Any]:
        """Choice of frames; :data:`CLIP_IMAGES` says that a row holds several images."""
        return {**super().record, "frame": "evenly spaced among those shown at that rate", CLIP_IMAGES: self.frames}

    def pictures(self, path: Path) -> Iterator[Image.Image]:
        """Decode the frames at the regular rate, and choose from them."""
        found = list(super().pictures(path))
        for part in range(self.frames):
            yield found[(2 * part + 1) * len(found) // (2 * self.frames)]

    def tokens(self, tokens: int) -> int:
        """Return the number of vectors of all frames."""
        return self.frames * tokens

    def row(self, features: np.ndarray) -> np.ndarray:
        """Return the vectors of all frames, one frame after the other."""
        return features.reshape(-1, features.shape[-1])


def find_files(folder: Path, media: Media) -> dict[str, Path]:
    """Find the files of one kind in a folder, recursively; their ids are the file names without suffix.

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
    """Count the files of other kinds in a folder, recursively, by suffix."""
    others = (path for path in folder.rglob("*") if path.suffix.lower() not in media.suffixes and path.is_file())
    return Counter(path.suffix.lower() or "without a suffix" for path in others)


def several_frames(paths: Iterable[Path]) -> list[Path]:
    """Return the images with more than one frame; unreadable files are excluded."""
    found = []
    for path in paths:
        if path.suffix.lower() in SEVERAL_FRAMES:
            try:
                with Image.open(path) as image:
                    count = getattr(image, "n_frames", 1)
            except Exception:  # reported when the pixels are read
                continue
            if count > 1:
                found.append(path)
    return found
