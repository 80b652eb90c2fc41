"""JSONL files, here or at a URL, plain or compressed: an object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import fsspec

from lcm_ds.errors import InputError, first_line
from lcm_ds.text.columns import Columns
from lcm_ds.text.files import check_size
from lcm_ds.text.sources import TextDocument

_MARKED = 500  # lines from one mark to the next
_LOOKED_AT = 100  # rows that tell which columns there are: a row may lack what others have
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
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
        """The file, read once for where its lines begin. Raises InputError where its first rows lack columns."""
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
        except Exception as error:  # an OSError, and what the libraries of compression and of remote places raise
            raise InputError(f"{name}: cannot be read: {first_line(error)}") from None
        found = cls(columns, place, name, size, position, rows + (not line_begins), marks)
        first_rows = [found._object(number, line) for number, line in found._lines(0, min(_LOOKED_AT, found.rows))]
        if first_rows:
            columns.check_rows(name, first_rows)
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
        check_size(self.place, self.name, self.size)
        for number, line in self._lines(first, last):
            yield self.columns.document(self.name, number, self._object(number, line))

    def _lines(self, first: int, last: int) -> Iterator[tuple[int, bytes]]:
        try:
            with _open(self.place) as file:
                number = 0
                if not self.place.endswith(_COMPRESSED):
                    number = first // _MARKED * _MARKED
                    file.seek(self.marks[first // _MARKED])
                for line in file:
                    if number >= last:
                        return
                    if number >= first:
                        yield number, line
                    number += 1
        except Exception as error:  # as above
            raise InputError(f"{self.name}: cannot be read: {first_line(error)}") from None

    def _object(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            values = json.loads(line)
        except ValueError as error:
            raise InputError(f"{self.name}: cannot be read: line {number + 1} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise InputError(f"{self.name}: line {number + 1} is not an object with columns: {line[:40]!r}")
        return values


def _open(place: str) -> Any:
    if place.endswith(_COMPRESSED) and fsspec.utils.infer_compression(place) is None:
        raise ImportError(f"{place[place.rindex('.') :]} needs: pip install zstandard")  # the one that may be missing
    return fsspec.open(place, "rb", compression="infer").open()
