"""Image files read on the fly, in place of a feature store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL.Image import Image
from torch import Tensor

from data_modules.extraction.media import Images, find_files
from data_modules.store.store import MissingFeatures


class Reader(Protocol):
    """Conversion of images to the input of a model, such as :class:`vlpet_lightning.backbones.pixels.PixelReader`."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(F, D)`` of an image's pixels."""

    def record(self) -> dict[str, Any]:
        """Describe the pixels as plain data."""

    def __call__(self, image: Image) -> Tensor:
        """Return the ``(F, D)`` float32 pixels of an RGB image."""


class UnreadableImage(RuntimeError):
    """Raised for an image file that cannot be read; the message names it and the cure."""


class MissingImages(MissingFeatures):
    """Raised for images without a file."""

    what = "file"
    cure = "Add the files"


class ImageFiles:
    """Read access to the image files of a folder by row, used like a :class:`~data_modules.store.store.FeatureStore`.

    An image's id is its file name without the suffix, as in ``data extract images``; rows are in the order of the
    paths.

    Args:
        folder: Folder of the files, searched recursively.
        exif_orientation: Whether to apply the images' EXIF orientation.

    Attributes:
        reader: Conversion of images to pixels; None until the model is known.

    Raises:
        FileNotFoundError: If there is no such folder, or no image in it.
        UnusableFiles: If two files have the same id.
    """

    has_lengths = False

    def __init__(self, folder: Path, exif_orientation: bool = True) -> None:
        self.where: Path | str = folder
        self.folder = folder
        self.media = Images(exif_orientation)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no folder {folder}: set `images` of the data module to the folder that has {folder.name} with the "
                "image files in it"
            )
        self.by_id = find_files(folder, self.media)
        self.paths = list(self.by_id.values())
        self.reader: Reader | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {id: row for row, id in enumerate(self.by_id)}

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """Look up the rows of images.

        Args:
            ids: ``n`` image ids.

        Returns:
            ``(n,)`` int64.

        Raises:
            MissingImages: If some have no file.
        """
        missing = [id for id in ids if id not in self._row_of]
        if missing:
            raise MissingImages(self.where, missing, len(ids))
        return np.array([self._row_of[id] for id in ids], dtype=np.int64)

    def lengths(self, rows: np.ndarray) -> None:
        """Return None: all images have the same number of rows of pixels."""

    def expect(self, shards: Sequence[int]) -> None:
        """Do nothing: there are no shards."""

    def check_sizes(self) -> None:
        """Do nothing: the folder was listed when this object was made."""

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Read the pixels of some images.

        Args:
            rows: ``(n,)`` row numbers; a file that is in it several times is read once.

        Returns:
            ``(n, F, D)`` float32.

        Raises:
            RuntimeError: If no model has set the reader.
            UnreadableImage: If a file cannot be read.
        """
        if self.reader is None:
            raise RuntimeError(
                "the images cannot be read before the model is built: call data.read_images_with(module.pixel_reader())"
            )
        distinct, places = np.unique(rows, return_inverse=True)
        return np.stack([self.reader(self.read(self.paths[row])).numpy() for row in distinct.tolist()])[places]

    def read(self, path: Path) -> Image:
        """Read an image file in RGB.

        Raises:
            UnreadableImage: If it cannot be read.
        """
        try:
            (picture,) = self.media.pictures(path)
        except Exception as error:  # Pillow raises many kinds
            reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
            raise UnreadableImage(
                f"the image {path} cannot be read ({reason}): copy it again, or take its questions out of the "
                "annotations; an interrupted training is resumed with --ckpt_path auto"
            ) from error
        return picture

    @property
    def meta(self) -> Mapping[str, Any]:
        """Description of the files, in the form of a store's ``meta.json``.

        Raises:
            RuntimeError: If no model has set the reader.
        """
        if self.reader is None:
            raise RuntimeError("the pixels cannot be described before the model is built")
        tokens, dim = self.reader.shape
        return {
            "rows": len(self),
            "tokens": tokens,
            "dim": dim,
            "encoding": "pixels",
            "index": [],
            "shards": self._sizes,
            "extractor": {**self.reader.record(), **self.media.record},
        }

    @cached_property
    def _sizes(self) -> list[dict[str, Any]]:
        return [{"file": str(path.relative_to(self.folder)), "bytes": path.stat().st_size} for path in self.paths]
