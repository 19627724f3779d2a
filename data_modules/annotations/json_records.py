"""Records of JSON and JSON lines files, decoded one at a time: large files need no more memory than small ones."""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from data_modules.annotations.columns import ERRORS
from data_modules.annotations.records import AnnotationError

CHUNK = 1 << 20  # bytes per read
_SPACE = re.compile(r"[ \t\n\r]*")


def read_records(path: Path, key: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSON or JSON lines (``.jsonl``) file; either may be compressed (``.gz``).

    Args:
        path: The file.
        key: Key of the list of records; None if the list is the top level.

    Raises:
        AnnotationError: If the file is not valid JSON or has no such list, or a record is not an object. Records before
            the error are yielded first.
    """
    try:
        yield from _objects(path, _lines(path) if ".jsonl" in path.suffixes else _items(path, key))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise AnnotationError(f"{path} is not a complete gzip file ({error}): fetch it again") from error


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading; one whose name ends in ``.gz`` is decompressed."""
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file with one record per line, whatever its name.

    Raises:
        AnnotationError: As :func:`read_records`.
    """
    yield from _objects(path, _lines(path))


def _objects(path: Path, records: Iterator[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    for where, record in records:
        if not isinstance(record, dict):
            raise AnnotationError(f"{path}, {where} must be a JSON object, got {str(record)[:40]!r}: fetch it again")
        yield record


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open_binary(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise AnnotationError(
                    f"{path}, line {number} is not valid JSON ({error}): the file may be cut short, fetch it again"
                ) from error
            yield f"line {number}", record


def _items(path: Path, key: str | None) -> Iterator[tuple[str, Any]]:
    with open_binary(path) as file:
        document = _Document(file)
        try:
            document.start()
            for number, record in enumerate(document.items() if key is None else document.items_under(key)):
                yield f"record {number}", record
            document.end()
        except json.JSONDecodeError as error:
            where = f"{error.msg}: character {document.passed + error.pos}"
            raise AnnotationError(f"{path} is not valid JSON ({where}): it may be cut short, fetch it again") from error
        except UnicodeDecodeError as error:
            raise AnnotationError(f"{path} is not valid JSON ({error}): it may be cut short, fetch it again") from error
    if not document.found:
        raise AnnotationError(f"{path} has no list of records {'at its top' if key is None else f'under {key!r}'}")


class _Document:
    """Decoder of a JSON document, part by part.

    Args:
        file: The document, in any of JSON's encodings.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.found = False  # whether there was a list of records
        self.passed = 0  # characters before those in memory
        self._file = file
        self._bytes = codecs.getincrementaldecoder("utf-8")()
        self._scan = json.JSONDecoder().raw_decode
        self._text = ""
        self._at = 0
        self._ended = False

    def start(self) -> None:
        """Detect the encoding."""
        first = self._file.read(4)
        self._bytes = codecs.getincrementaldecoder(json.detect_encoding(first))(ERRORS)
        self._text = self._bytes.decode(first)

    def items(self) -> Iterator[Any]:
        """Yield the items of the list that comes next; decode and ignore anything else."""
        if self._next() != "[":
            self._value()
            return
        self.found = True
        self._at += 1
        if self._next() == "]":
            self._at += 1
            return
        while True:
            yield self._value()
            if self._separator("]"):
                return

    def items_under(self, key: str) -> Iterator[Any]:
        """Yield the items of the list under a key of the object that comes next; decode and ignore anything else."""
        if self._next() != "{":
            self._value()
            return
        self._at += 1
        if self._next() == "}":
            self._at += 1
            return
        while True:
            if self._next() != '"':
                raise self._error("Expecting property name enclosed in double quotes")
            name = self._value()
            if self._next() != ":":
                raise self._error("Expecting ':' delimiter")
            self._at += 1
            if name == key:
                yield from self.items()
            else:
                self._value()
            if self._separator("}"):
                return

    def end(self) -> None:
        """Check that nothing follows.

        Raises:
            json.JSONDecodeError: If something does.
        """
        if self._next():
            raise self._error("Extra data")

    def _separator(self, closing: str) -> bool:
        """Skip a comma or the closing bracket; return whether it was the latter."""
        mark = self._next()
        if mark not in (",", closing):
            raise self._error("Expecting ',' delimiter")
        self._at += 1
        return mark == closing

    def _next(self) -> str:
        """Skip white space and return the next character, an empty string at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read(CHUNK):
                return ""

    def _value(self) -> Any:
        """Decode the next value."""
        self._next()
        size = CHUNK
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except json.JSONDecodeError:
                if not self._read(size):
                    raise
            else:
                if end < len(self._text) or not self._read(size):  # a number may continue in the next chunk
                    self._at = end
                    return value
            size *= 2  # so that a value of many chunks is not decoded once per chunk

    def _read(self, size: int) -> bool:
        """Drop the decoded text and read on; return whether the file went on."""
        if self._ended:
            return False
        content = self._file.read(size)
        self._ended = not content
        self.passed += self._at
        self._text = self._text[self._at :] + self._bytes.decode(content, final=self._ended)
        self._at = 0
        return True

    def _error(self, what: str) -> json.JSONDecodeError:
        return json.JSONDecodeError(what, self._text, self._at)
