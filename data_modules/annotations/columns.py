"""Columns of strings as bytes and integers, which need a fraction of the memory of Python strings.

Their arrays are hashed and saved as they are.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast, overload

import numpy as np

ERRORS = "surrogatepass"  # JSON may contain lone surrogates
CHUNK = 10_000  # rows decoded at once when iterating

T = TypeVar("T")
Arrays = dict[str, np.ndarray]


class Column(Sequence[T]):
    """Base class of immutable columns, equal to any sequence of the same values."""

    def take(self, rows: np.ndarray) -> list[T]:
        """Return the values of some ``(B,)`` rows."""
        raise NotImplementedError

    def arrays(self) -> Arrays:
        """Return the arrays that define the column, by name."""
        raise NotImplementedError

    def parts(self) -> Iterator[bytes]:
        """Yield the bytes that define the column, for a digest."""
        return (array.tobytes() for array in self.arrays().values())

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        rows = range(len(self))[index]  # checks bounds
        if isinstance(rows, range):
            return self.take(np.arange(rows.start, rows.stop, rows.step))
        return self.take(np.array([rows]))[0]

    def __iter__(self) -> Iterator[T]:
        for start in range(0, len(self), CHUNK):
            yield from self.take(np.arange(start, min(start + CHUNK, len(self))))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class Strings(Column[str]):
    """Column of strings in one buffer.

    Args:
        content: All strings in UTF-8, as uint8.
        offsets: ``(n + 1,)`` int64: string ``i`` is ``content[offsets[i]:offsets[i + 1]]``.
    """

    def __init__(self, content: np.ndarray, offsets: np.ndarray) -> None:
        self.content = content
        self.offsets = offsets

    @classmethod
    def of(cls, strings: Iterable[str]) -> Strings:
        """Store strings as a column."""
        builder = StringsBuilder()
        for string in strings:
            builder.append(string)
        return builder.column()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def take(self, rows: np.ndarray) -> list[str]:
        content = cast(Any, self.content).data
        places = zip(self.offsets[rows].tolist(), self.offsets[rows + 1].tolist(), strict=True)
        return [str(content[start:end], "utf-8", ERRORS) for start, end in places]

    def arrays(self) -> Arrays:
        return {"content": self.content, "offsets": self.offsets}


class Coded(Column[str]):
    """Column of strings that repeat: numbers of distinct strings.

    Args:
        codes: ``(n,)`` int32 positions in ``values``.
        values: The distinct strings.
    """

    def __init__(self, codes: np.ndarray, values: Strings) -> None:
        self.codes = codes
        self.values = values

    @classmethod
    def of(cls, strings: Iterable[str]) -> Coded:
        """Store strings as a column."""
        builder = CodedBuilder()
        for string in strings:
            builder.append(string)
        return builder.column()

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, rows: np.ndarray) -> list[str]:
        return self.values.take(self.codes[rows])

    def extended(self, string: str) -> Coded:
        """Return the column with a string added to its end."""
        ending = Strings.of([string])
        content = np.concatenate([self.values.content, ending.content])
        offsets = np.append(self.values.offsets, len(content))
        return Coded(np.append(self.codes, np.int32(len(self.values))), Strings(content, offsets))

    def arrays(self) -> Arrays:
        return {"codes": self.codes, **self.values.arrays()}


class CodedTuples(Column[tuple[str, ...]]):
    """Column of tuples of strings that repeat.

    Args:
        codes: ``(n, N)`` int32 positions in ``values``.
        values: The distinct strings.
    """

    def __init__(self, codes: np.ndarray, values: Strings) -> None:
        self.codes = codes
        self.values = values

    @classmethod
    def of(cls, tuples: Sequence[tuple[str, ...]]) -> CodedTuples:
        """Store tuples of equal lengths as a column."""
        flat = Coded.of(string for strings in tuples for string in strings)
        return cls(flat.codes.reshape(len(tuples), -1), flat.values)

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, rows: np.ndarray) -> list[tuple[str, ...]]:
        codes = self.codes[rows]
        strings = iter(self.values.take(codes.reshape(-1)))
        return list(zip(*[strings] * codes.shape[1], strict=True))

    def arrays(self) -> Arrays:
        return {"codes": self.codes, **self.values.arrays()}


class StringsBuilder:
    """Builder of a :class:`Strings`, string by string."""

    def __init__(self) -> None:
        self._content = bytearray()
        self._ends = array("q", [0])

    def append(self, string: str) -> None:
        self._content += string.encode("utf-8", ERRORS)
        self._ends.append(len(self._content))

    def column(self) -> Strings:
        """Return the column, whose arrays share the builder's memory."""
        return Strings(np.frombuffer(self._content, np.uint8), np.frombuffer(self._ends, np.int64))


class CodedBuilder:
    """Builder of a :class:`Coded`, string by string."""

    def __init__(self) -> None:
        self._index: dict[str, int] = {}
        self._codes = array("i")

    def append(self, string: str) -> None:
        self._codes.append(self._index.setdefault(string, len(self._index)))

    def column(self) -> Coded:
        """Return the column."""
        return Coded(np.frombuffer(self._codes, np.int32), Strings.of(self._index))


def coded(strings: Iterable[str]) -> Coded:
    """Return strings as a column, the same object if they are one."""
    return strings if isinstance(strings, Coded) else Coded.of(strings)


def values_at(sequence: Sequence[T], rows: np.ndarray) -> list[T]:
    """Return the values of a column or any other sequence in some ``(B,)`` rows."""
    return sequence.take(rows) if isinstance(sequence, Column) else [sequence[row] for row in rows]


def column_of(arrays: Mapping[str, np.ndarray]) -> Column:
    """Return the column with these arrays, the inverse of its method ``arrays``."""
    strings = Strings(arrays["content"], arrays["offsets"])
    if "codes" not in arrays:
        return strings
    return (Coded if arrays["codes"].ndim == 1 else CodedTuples)(arrays["codes"], strings)
