"""How a store keeps its rows on the disk: as they are, compressed without loss, or in 8 bits.

A row of a shard is ``(tokens, dim)`` float16. Which encoding a store has is in its ``meta.json``; who gathers features
does not see it. What each costs and loses is printed by ``python -m tests.benchmarks.stores`` and ``data recode``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

LEVELS = 255  # of 8 bits, beside the lowest value
SCALE = np.dtype("<f4")
EXTRA = 2 * SCALE.itemsize  # bytes behind a vector's 8-bit values: its lowest value and its step


class Encoding:
    """Float16 as it is: a NumPy file, mapped; a gather is a copy."""

    name = "float16"
    suffix = ".npy"
    dtype: np.dtype = np.dtype("<f2")
    lossy = False

    def shape(self, tokens: int, dim: int) -> tuple[int, int]:
        """Of a row as it is stored."""
        return tokens, dim

    def row_bytes(self, tokens: int, dim: int) -> int:
        """Of a row on the disk, at most."""
        rows, width = self.shape(tokens, dim)
        return rows * width * self.dtype.itemsize

    def packed(self, shape: tuple[int, int, int], pieces: Iterable[np.ndarray]) -> Iterator[bytes | memoryview]:
        """A shard's file, piece by piece.

        Args:
            shape: ``(rows, tokens, dim)`` of the shard.
            pieces: Its rows in order, some at a time, float16.
        """
        yield npy_header(self.dtype, shape)
        for piece in pieces:
            yield np.ascontiguousarray(piece, dtype=np.float16).data.cast("B")

    def open(self, file: BinaryIO, rows: int, tokens: int, dim: int) -> np.ndarray | PackedRows:
        """Map a shard, which stays mapped when the file is closed.

        Raises:
            ValueError: If the file does not hold these rows; says what it holds.
        """
        return load_npy(file, self.dtype, (rows, *self.shape(tokens, dim)))

    def decoded(self, stored: Tensor) -> Tensor:
        """Stored rows as ``(n, tokens, dim)`` float16, on their device."""
        return stored


class EightBit(Encoding):
    """Eight bits a value between the lowest and the highest of its vector: half the size.

    The error of a value is at most half a step, a 510th of its vector's range, beside float16's rounding. A vector's
    lowest value is kept, so zeros behind a ReLU stay zeros.
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
        for row in range(len(features)):  # a row fits into the cache, a batch in float32 does not: four times faster
            features[row] = levels[row].float().mul_(step[row]).add_(low[row])
        return features


class Compressed(Encoding):
    """Rows compressed one by one, without loss; needs pyarrow, and a core's time to read.

    A file holds the compressed rows and then ``(rows + 1,)`` int64 positions of their beginnings.

    Args:
        name: A codec of pyarrow: ``zstd`` or ``lz4``.
    """

    suffix = ".rows"

    def __init__(self, name: str) -> None:
        codec(name)  # fails here where pyarrow is missing
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
    """A codec of pyarrow, made once: it cannot be pickled."""
    import pyarrow as pa

    return pa.Codec("lz4_raw" if name == "lz4" else name)


class PackedRows:
    """The compressed rows of a shard, mapped; ``rows[i]`` decompresses one.

    Args:
        file: The shard.
        rows: How many it has.
        shape: ``(tokens, dim)``.
        codec: Of pyarrow.

    Raises:
        ValueError: If the file does not hold so many rows.
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
    """An encoding by its name.

    Raises:
        ValueError: If there is no such encoding.
        ModuleNotFoundError: If it needs pyarrow, which is not installed.
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
    """The beginning of a NumPy file."""
    buffer = BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def load_npy(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Map a NumPy file; ``np.load`` could only do that by its name, which may be gone.

    Raises:
        ValueError: If it is none, or holds something else; says what.
    """
    try:
        np.lib.format.read_magic(file)
        found, _, kind = np.lib.format.read_array_header_1_0(file)
    except ValueError as error:
        raise ValueError("it is not a NumPy file") from error
    if found != shape or kind != dtype:
        raise ValueError(f"it holds {kind} {found} instead of {dtype} {shape}")
    mapped = np.memmap(file, dtype=dtype, mode="r", offset=file.tell(), shape=shape)
    return np.asarray(mapped)  # rows of a memmap are memmaps, which are slow to make
