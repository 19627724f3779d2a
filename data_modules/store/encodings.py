"""Row encodings of a store: plain float16, lossless compression, or 8 bits.

A row of a shard is ``(tokens, dim)`` float16. The encoding is recorded in the store's ``meta.json``, and readers
decode the rows transparently. ``python -m tests.benchmarks.stores`` and ``data recode`` print the cost and the error
of each encoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

LEVELS = 255  # quantisation steps of 8 bits above the minimum
SCALE = np.dtype("<f4")
EXTRA = 2 * SCALE.itemsize  # bytes after a vector's 8-bit values: its minimum and its step


class Encoding:
    """Plain float16 in a memory-mapped NumPy file; a gather is a copy."""

    name = "float16"
    suffix = ".npy"
    dtype: np.dtype = np.dtype("<f2")
    lossy = False

    def shape(self, tokens: int, dim: int) -> tuple[int, int]:
        """Shape of a stored row."""
        return tokens, dim

    def row_bytes(self, tokens: int, dim: int) -> int:
        """Maximum size of a row on disk, in bytes."""
        rows, width = self.shape(tokens, dim)
        return rows * width * self.dtype.itemsize

    def packed(self, shape: tuple[int, int, int], pieces: Iterable[np.ndarray]) -> Iterator[bytes | memoryview]:
        """Encode a shard's file, piece by piece.

        Args:
            shape: ``(rows, tokens, dim)`` of the shard.
            pieces: Its float16 rows in order, in chunks of any size.
        """
        yield npy_header(self.dtype, shape)
        for piece in pieces:
            yield np.ascontiguousarray(piece, dtype=np.float16).data.cast("B")

    def open(self, file: BinaryIO, rows: int, tokens: int, dim: int) -> np.ndarray | PackedRows:
        """Memory-map a shard; the mapping outlives the file object.

        Raises:
            ValueError: If the file does not hold these rows; the message describes its contents.
        """
        return load_npy(file, self.dtype, (rows, *self.shape(tokens, dim)))

    def decoded(self, stored: Tensor) -> Tensor:
        """Decode stored rows to ``(n, tokens, dim)`` float16, on their device."""
        return stored


class EightBit(Encoding):
    """Eight bits per value, between the minimum and the maximum of its vector: half the size.

    The error of a value is at most half a step, a 510th of its vector's range, in addition to float16's rounding. A
    vector's minimum is stored exactly, so zeros after a ReLU stay zeros.
    """

    name = "uint8"
    dtype: np.dtype = np.dtype("u1")
    lossy = True

    def shape(self, tokens: int, dim: int) -> tuple[int, int]:
        return tokens, dim + EXTRA

    def packed(self, shape: tuple[int, int, int], pieces: Iterable[np.ndarray]) -> Iterator[bytes | memoryview]:
        yield npy_header(self.dtype, (shape[0], *self.shape(*shape[1:])))
        for piece in pieces:
            values = piece.astype(np.float32)
            low = values.min(axis=2, keepdims=True)
            step = (values.max(axis=2, keepdims=True) - low) / LEVELS
            levels = np.rint((values - low) / np.where(step > 0, step, 1)).astype(np.uint8)
            scales = np.concatenate([low, step], axis=2).astype(SCALE)
            yield np.concatenate([levels, scales.view(np.uint8)], axis=2).data.cast("B")

    def decoded(self, stored: Tensor) -> Tensor:
        levels = stored[..., :-EXTRA]
        scales = stored[..., -EXTRA:].contiguous().reshape(-1, EXTRA).view(torch.float32).reshape(*levels.shape[:2], 2)
        low, step = scales[..., :1], scales[..., 1:]
        if stored.device.type != "cpu":
            return (levels.float() * step + low).half()
        features = torch.empty(levels.shape, dtype=torch.float16)
        for row in range(len(features)):  # four times faster: a float32 row fits into the CPU cache, a batch does not
            features[row] = levels[row].float().mul_(step[row]).add_(low[row])
        return features


class Compressed(Encoding):
    """Lossless compression, row by row; needs pyarrow, and CPU time to decompress.

    A file holds the compressed rows, followed by their ``(rows + 1,)`` int64 start offsets.

    Args:
        name: pyarrow codec: ``zstd`` or ``lz4``.
    """

    suffix = ".rows"

    def __init__(self, name: str) -> None:
        codec(name)  # fail early if pyarrow is missing
        self.name = name

    def packed(self, shape: tuple[int, int, int], pieces: Iterable[np.ndarray]) -> Iterator[bytes | memoryview]:
        compress = codec(self.name).compress
        positions = [0]
        for piece in pieces:
            for row in np.ascontiguousarray(piece, dtype=np.float16):
                packed = compress(row.tobytes(), asbytes=True)
                positions.append(positions[-1] + len(packed))
                yield packed
        yield np.array(positions, dtype="<i8").tobytes()

    def open(self, file: BinaryIO, rows: int, tokens: int, dim: int) -> np.ndarray | PackedRows:
        return PackedRows(file, rows, (tokens, dim), codec(self.name))


@cache
def codec(name: str) -> Any:
    """Return a pyarrow codec, cached per process because codecs cannot be pickled."""
    import pyarrow as pa

    return pa.Codec("lz4_raw" if name == "lz4" else name)


class PackedRows:
    """Memory-mapped compressed rows of a shard; ``rows[i]`` decompresses one.

    Args:
        file: The shard.
        rows: Number of rows.
        shape: ``(tokens, dim)``.
        codec: The pyarrow codec.

    Raises:
        ValueError: If the file does not hold this number of rows.
    """

    def __init__(self, file: BinaryIO, rows: int, shape: tuple[int, int], codec: Any) -> None:
        self.shape = shape
        self.codec = codec
        self.bytes = np.memmap(file, dtype=np.uint8, mode="r")
        index = 8 * (rows + 1)
        if len(self.bytes) < index:
            raise ValueError(f"it is too short for {rows} compressed rows")
        self.positions = np.frombuffer(self.bytes[-index:].tobytes(), dtype="<i8")
        if self.positions[-1] != len(self.bytes) - index:
            raise ValueError(f"it does not hold {rows} compressed rows")

    def __getitem__(self, row: int) -> np.ndarray:
        packed = self.bytes[self.positions[row] : self.positions[row + 1]]
        try:
            whole = self.codec.decompress(packed.data, decompressed_size=2 * self.shape[0] * self.shape[1])
        except OSError as error:
            raise ValueError(f"row {row} cannot be decompressed ({error})") from error
        return np.frombuffer(whole, dtype=np.float16).reshape(self.shape)


ENCODINGS = ("float16", "uint8", "zstd", "lz4")


def encoding(name: str) -> Encoding:
    """Return an encoding by name.

    Raises:
        ValueError: If there is no such encoding.
        ModuleNotFoundError: If it needs pyarrow and pyarrow is not installed.
    """
    if name not in ENCODINGS:
        raise ValueError(f"unknown row encoding {name!r}: choose from {', '.join(ENCODINGS)}")
    if name == "float16":
        return Encoding()
    if name == "uint8":
        return EightBit()
    try:
        return Compressed(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"rows compressed with {name} need pyarrow: pip install 'vlpet-lightning[data]'"
        ) from error


def npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """Header of a NumPy file."""
    buffer = BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def load_npy(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Memory-map an open NumPy file; ``np.load`` needs its path, which may have been removed.

    Raises:
        ValueError: If it is not a NumPy file or holds another array; the message describes its contents.
    """
    try:
        np.lib.format.read_magic(file)
        found, _, kind = np.lib.format.read_array_header_1_0(file)
    except ValueError as error:
        raise ValueError("it is not a NumPy file") from error
    if found != shape or kind != dtype:
        raise ValueError(f"it holds {kind} {found} instead of {dtype} {shape}")
    mapped = np.memmap(file, dtype=dtype, mode="r", offset=file.tell(), shape=shape)
    return np.asarray(mapped)  # indexing a memmap creates memmaps, which is slow
