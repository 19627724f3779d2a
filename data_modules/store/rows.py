"""Interface of the images that a data module reads: stored features, or image files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class AnyStore(Protocol):
    """Images by row: a :class:`~data_modules.store.store.FeatureStore`, or
    :class:`~data_modules.extraction.image_files.ImageFiles`.
    """

    @property
    def where(self) -> Path | str:
        """Location, for messages."""

    @property
    def meta(self) -> Mapping[str, Any]:
        """Content of ``meta.json``."""

    @property
    def has_lengths(self) -> bool:
        """Whether rows differ in length."""

    def __len__(self) -> int: ...
    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """Look up the rows of images."""

    def lengths(self, rows: np.ndarray) -> np.ndarray | None:
        """Return the original length of rows, or None."""

    def expect(self, shards: Sequence[int]) -> None:
        """Announce the shards that are read next."""

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Return the ``(n, F, D)`` features or pixels of some rows."""

    def check_sizes(self) -> None:
        """Check the files without reading them."""
