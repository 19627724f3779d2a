"""Locations of a data module's annotation files and feature stores: folders or URLs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_modules.store.store import FeatureStore
from data_modules.streaming.remote_annotations import mirror, mirror_of
from data_modules.streaming.streamed_store import Stream, StreamedStore, open_stream


class Places:
    """Annotation files and feature stores of a data module, local or remote.

    Args:
        root: Folder or URL with the annotation files.
        features: Folder or URL with the feature stores, or in the published layout; None: ``features`` below the root.
        stream: Streaming settings; if None, features are streamed only from URLs, with the defaults of
            :class:`Stream`.
    """

    def __init__(self, root: str, features: str | None, stream: Stream | None) -> None:
        self.url = root if is_url(root) else None
        self.features = features if features is not None else f"{root.rstrip('/')}/features"
        self.stream = stream or Stream()
        self.streams = stream is not None or is_url(self.features)
        self.root = Path(root) if self.url is None else mirror_of(self.url, self.stream.folder)
        self._opened: dict[str, StreamedStore] = {}
        self._fetched: set[str] = set()

    def fetch(self, names: Sequence[str], optional: Sequence[str]) -> None:
        """Copy annotation files from a URL to ``root``, each once per process; does nothing for a local root.

        Args:
            names: Names of the files.
            optional: Names of those that may be missing.

        Raises:
            FileNotFoundError: If a required file is missing.
            FeatureStoreError: If a file cannot be read or does not match the manifest, or the disk is full.
        """
        new = [name for name in names if name not in self._fetched]
        if self.url is not None and new:
            mirror(self.stream.remote(self.url), new, self.root, optional=optional)
            self._fetched.update(new)

    def store(self, name: str) -> FeatureStore:
        """Open a feature store.

        Raises:
            FeatureStoreError: If there is none, or it cannot be used.
        """
        if not self.streams:
            return FeatureStore(Path(self.features) / name)
        if name not in self._opened:
            self._opened[name] = open_stream(self.features, name, self.stream)
        return self._opened[name]


def is_url(place: str) -> bool:
    """Whether a location is a URL and not a path."""
    return "://" in place
