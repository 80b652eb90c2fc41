"""JSONL files, here or at a URL, plain or compressed: an object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import fsspec

from lcm_ds.errors import InputError
from lcm_ds.text.columns import Columns, first_line
from lcm_ds.text.sources import TextDocument

_MARKED = 500  # lines from one mark to the next
_PIECE = 1 << 20


class JsonlFile:
    """A file; marks: where every so many lines begin, in bytes of the text; size: bytes of the file.

    A plain file is read from the mark before a range, a compressed one from its beginning.
    """

    def __init__(
        self, columns: Columns, place: str, name: str, size: int, characters: int, rows: int, marks: list[int]
    ) -> None:
        self.columns, self.place, self.name, self.size = columns, place, name, size
        self.characters, self.rows, self.marks = characters, rows, marks

    @classmethod
    def look(cls, columns: Columns, place: str, name: str) -> JsonlFile:
        """The file, read once for where its lines begin. Raises InputError where its first row lacks columns."""
        rows, marks, position, line_begins = 0, [0], 0, True
        try:
            filesystem, path = fsspec.core.url_to_fs(place)
            size = filesystem.size(path)
            with _open(place) as file:
                while piece := file.read(_PIECE):
                    at = -1
                    while (at := piece.find(b"\n", at + 1)) >= 0:
                        rows += 1
                        if rows % _MARKED == 0:
                            marks.append(position + at + 1)
                    position += len(piece)
                    line_begins = piece.endswith(b"\n")
        except (OSError, ValueError, ImportError) as error:
            raise InputError(f"{name}: cannot be read: {first_line(error)}") from None
        found = cls(columns, place, name, size, position, rows + (not line_begins), marks)
        for number, values in found._objects(0, min(1, found.rows)):
            mistakes = columns.missing(name, values)
            if mistakes:
                raise InputError(mistakes)
            columns.document(name, number, values)
        return found

    def index(self) -> dict[str, Any]:
        """What `look` found, as the constructor takes it."""
        return {"place": self.place, "name": self.name, "size": self.size, "characters": self.characters,
                "rows": self.rows, "marks": self.marks}  # fmt: skip

    def pieces(self, size: int) -> Iterator[int]:
        """`size` rows, again and again; a range may end after any line."""
        yield from (min(size, self.rows - start) for start in range(0, self.rows, size))

    def read(self, first: int, last: int) -> Iterator[TextDocument]:
        """Rows `first` up to, not including, `last`. Raises InputError."""
        for number, values in self._objects(first, last):
            yield self.columns.document(self.name, number, values)

    def _objects(self, first: int, last: int) -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            with _open(self.place) as file:
                number = 0
                if not _compressed(self.place):
                    number = first // _MARKED * _MARKED
                    file.seek(self.marks[first // _MARKED])
                for line in file:
                    if number >= last:
                        return
                    if number >= first:
                        yield number, self._object(number, line)
                    number += 1
        except (OSError, EOFError) as error:
            raise InputError(f"{self.name}: cannot be read: {first_line(error)}") from None

    def _object(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            values = json.loads(line)
        except ValueError as error:
            raise InputError(f"{self.name}: cannot be read: line {number + 1} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise InputError(f"{self.name}: line {number + 1} is not an object with columns: {line[:40]!r}")
        return values


def _compressed(place: str) -> bool:
    return place.endswith((".gz", ".zst", ".bz2", ".xz"))


def _open(place: str) -> Any:
    return fsspec.open(place, "rb", compression="infer").open()
