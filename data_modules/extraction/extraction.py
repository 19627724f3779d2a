"""Extraction of files into the parts of feature stores; unreadable files are skipped.

A store is written part by part (data_modules/store/resumable.py). An unreadable file is left out of its part and
recorded there with its checksum; once the file's content changes, the part is rewritten.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_modules.extraction.media import Media
from data_modules.store.pooling import are_finite
from data_modules.store.resumable import AGAIN, Part, ResumableStore, Rows
from vlpet_lightning.checksums import checksum
from vlpet_lightning.vision.choice import AnyEncoder
from vlpet_lightning.vision.encoders import PACKAGES, EncoderSettings, versions

SHARD_BYTES = 256 * 2**20  # upper limit of a part, which is held in memory until it is written
STATISTICS = "calibration.safetensors"
MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.EIO)  # machine faults
SAID_BY_FFMPEG = (errno.ENOMEM, errno.EIO)  # FFmpeg also reports these for damaged files


class ExtractionError(RuntimeError):
    """An extraction that cannot continue; the message gives the reason and the cure."""


@dataclass(frozen=True)
class Source:
    """Files that become one store.

    Args:
        out: Folder of the store.
        folder: Folder of the files.
        files: Paths by id, in row order.
    """

    out: Path
    folder: Path
    files: dict[str, Path]


@dataclass(frozen=True)
class Extraction:
    """Description of an extraction, shared by all its processes.

    Args:
        settings: Settings of the encoder.
        media: Kind of the files.
        sources: Sources, each of which becomes one store.
        rows: Row encoding, one of :data:`data_modules.store.encodings.ENCODINGS`.
        shard_rows: Files per part.
        batch_size: Number of pictures encoded at once.
        workers: Decoding processes per encoding process; 0 decodes in the encoding process.
    """

    settings: EncoderSettings
    media: Media
    sources: Sequence[Source]
    rows: str
    shard_rows: int
    batch_size: int
    workers: int

    def stores(self, encoder: AnyEncoder) -> list[ResumableStore]:
        """Open the stores in their current state.

        Raises:
            FeatureStoreError: If a folder holds another store, complete or unfinished.
        """
        tokens = self.media.tokens(encoder.tokens)
        record = {**encoder.record, **self.media.record, "versions": versions(*PACKAGES, *self.media.packages)}
        at_once = max(1, min(self.shard_rows, SHARD_BYTES // (2 * tokens * encoder.dim)))
        return [
            ResumableStore(
                source.out,
                list(_parts(source, at_once)),
                tokens=tokens,
                dim=encoder.dim,
                extractor=record,
                rows=self.rows,
                repaired=partial(is_repaired, source.files),
            )
            for source in self.sources
        ]

    def files_of(self, store: int, stores: Sequence[ResumableStore], number: int) -> list[tuple[str, Path]]:
        """Return the ids and paths of a part."""
        start = sum(part.rows for part in stores[store].parts[:number])
        return list(self.sources[store].files.items())[start : start + stores[store].parts[number].rows]


def _parts(source: Source, at_once: int) -> Iterator[Part]:
    paths = list(source.files.values())
    for start in range(0, len(paths), at_once):
        chunk = paths[start : start + at_once]
        names = "\n".join(path.relative_to(source.folder).as_posix() for path in chunk)
        digest = hashlib.sha256(names.encode()).hexdigest()[:16]
        yield Part(f"{chunk[0].name} to {chunk[-1].name} (names {digest})", None, len(chunk), list)


def is_repaired(files: dict[str, Path], record: dict[str, Any]) -> bool:
    """Whether the content of an unreadable file has changed since."""
    return _checksum(files[record["id"]]) != record["sha256"]


def _checksum(path: Path) -> str | None:
    try:
        return checksum(path)
    except OSError:
        return None


class _Files(Dataset):
    """Dataset of the pixels of each file, or the reason why it cannot be read."""

    def __init__(self, paths: Sequence[Path], media: Media, pixels: Callable[[Any], Tensor]) -> None:
        self.paths = paths
        self.media = media
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        path = self.paths[index]
        try:
            return torch.stack([self.pixels(picture) for picture in self.media.pictures(path)])
        except Exception as error:  # decoders raise many kinds of errors; extraction continues past them
            reason = str(getattr(error, "strerror", None) or error)
            reason = " ".join(reason.split()) or type(error).__name__
            if _is_of_the_machine(error, path):
                cure = "see to the machine, or take the file away to go without it"
                return ExtractionError(f"{path} cannot be read now ({reason}): {cure}, {AGAIN}")
            return reason


def _is_of_the_machine(error: Exception, path: Path) -> bool:
    number = getattr(error, "errno", None)
    if type(error).__module__.startswith("av.") and number in SAID_BY_FFMPEG:
        return _checksum(path) is None
    return number in MACHINE or isinstance(error, MemoryError)


Item = Tensor | str | ExtractionError  # the file's pictures; why it cannot be read; why no file can be read
Batch = tuple[Tensor | None, list[int | str | ExtractionError]]  # pictures of some files; count or error of each


def _batch(items: list[Item]) -> Batch:
    """Concatenate all pictures into one tensor, since each tensor costs a worker a file descriptor."""
    read = [item for item in items if isinstance(item, Tensor)]
    return torch.cat(read) if read else None, [len(item) if isinstance(item, Tensor) else item for item in items]


def encode(
    extraction: Extraction,
    encoder: AnyEncoder,
    stores: Sequence[ResumableStore],
    todo: Sequence[tuple[int, int]],
    wrote: Callable[[int], object],
) -> None:
    """Write parts of stores.

    Args:
        extraction: Description of the extraction.
        encoder: AnyEncoder; it loads the batch norm statistics saved beside each store.
        stores: All stores.
        todo: Pairs of a store number and a part number in that store.
        wrote: Called with the number of files after each batch.

    Raises:
        FeatureStoreError: If the disk is full.
        ExtractionError: If the device has too little memory, or files are temporarily unreadable.
    """
    at_once = extraction.media.at_once or extraction.batch_size
    parts = [extraction.files_of(store, stores, number) for store, number in todo]
    paths = [path for files in parts for _, path in files]
    batches: list[list[int]] = []
    start = 0
    for files in parts:
        places = range(start, start + len(files))
        batches += [list(places[first : first + at_once]) for first in range(0, len(files), at_once)]
        start += len(files)
    # one loader for all parts, so that its workers keep decoding while a part is written
    loader = iter(
        DataLoader(
            _Files(paths, extraction.media, encoder.pixels),
            batch_sampler=batches,
            num_workers=extraction.workers,
            collate_fn=_batch,
        )
    )
    for (store, number), files in zip(todo, parts, strict=True):
        if encoder.needs_calibration:
            encoder.load_calibration(stores[store].path / STATISTICS)
        pieces, skipped = _rows(extraction, encoder, files, at_once, loader, wrote)
        rows = sum(len(piece.ids) for piece in pieces)
        made = replace(stores[store].parts[number], rows=rows, read=partial(list, pieces))
        stores[store].write(number, part=made, skipped=skipped)


def _rows(
    extraction: Extraction,
    encoder: AnyEncoder,
    files: Sequence[tuple[str, Path]],
    at_once: int,
    loader: Iterator[Batch],
    wrote: Callable[[int], object],
) -> tuple[list[Rows], list[dict[str, Any]]]:
    """Return the rows of a part, and records of its unreadable files."""
    pieces, skipped = list[Rows](), list[dict[str, Any]]()
    for start in range(0, len(files), at_once):
        pictures, counts = next(loader)
        features = None if pictures is None else _encoded(encoder, pictures, extraction.batch_size)
        ids, rows, lengths = list[str](), list[np.ndarray](), list[int]()
        place = 0
        for (id, path), count in zip(files[start : start + at_once], counts, strict=True):
            if isinstance(count, ExtractionError):
                raise count
            reason = count
            if features is not None and isinstance(count, int):
                found, place = features[place : place + count], place + count
                if are_finite(found).all():
                    ids.append(id)
                    rows.append(extraction.media.row(found))
                    lengths.append(count)
                    continue
                reason = "its features are not finite in float16"
            skipped.append({"id": id, "file": str(path), "reason": reason, "sha256": _checksum(path)})
        if ids:
            pieces.append(Rows(ids, np.stack(rows), np.array(lengths) if extraction.media.has_lengths else None))
        wrote(len(counts))
    return pieces, skipped


def _encoded(encoder: AnyEncoder, pictures: Tensor, batch_size: int) -> np.ndarray:
    """Encode pictures to ``(pictures, tokens, dim)`` float16."""
    try:
        features = torch.cat([encoder(batch) for batch in pictures.split(batch_size)])
    except torch.OutOfMemoryError as error:
        raise ExtractionError(
            f"{encoder.device} has too little memory: give a --batch_size below {batch_size}, {AGAIN}"
        ) from error
    with np.errstate(over="ignore"):
        return features.numpy().astype(np.float16)
