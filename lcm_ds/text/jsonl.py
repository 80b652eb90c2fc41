"""JSONL files, here or at a URL, plain or compressed: an object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lcm_ds.errors import InputError, first_line
from lcm_ds.text.base import Sequential, TextDocument
from lcm_ds.text.columns import Columns, RowsFile
from lcm_ds.text.files import COMPRESSED, check_size, open_plain, size_of

_MARKED = 500  # rows from one mark to the next
_INSPECTED = 100  # rows: one may lack columns that others have
_BOM = b"\xef\xbb\xbf"


@dataclass(kw_only=True, eq=False)
class JsonlFile(RowsFile):
    """A file; a row is a line that is not blank.

    marks: the byte at which every 500th row begins; blanks: blank lines before each of them. A plain file is read from
    the mark before a range, a compressed one from its beginning, or the end of the last range.
    """

    marks: list[int]
    blanks: list[int] = field(default_factory=list)  # source.json had none before blank lines were passed over

    def __post_init__(self) -> None:
        self._sequence = Sequential(lambda: self._from(0, 0))
        self.blanks = self.blanks or [0] * len(self.marks)

    @classmethod
    def inspect(cls, columns: Columns, place: str, name: str) -> JsonlFile:
        """The file, read once to find where its rows begin.

        Raises InputError if it cannot be read, is one JSON list, or if its first rows lack columns or are not JSON.
        """
        rows = blank = position = 0
        marks: list[int] = []
        blanks: list[int] = []
        try:
            size = size_of(place)
            with open_plain(place) as file:
                for line in file:
                    if _is_blank(line):
                        blank += 1
                    else:
                        if rows % _MARKED == 0:
                            marks.append(position)
                            blanks.append(blank)
                        rows += 1
                    position += len(line)
        except Exception as error:  # an OSError, and what the libraries of compression and of remote places raise
            raise InputError(f"{name}: cannot be read: {first_line(error)}") from None
        reader = cls(columns=columns, place=place, name=name, size=size, characters=position, rows=rows, marks=marks,
                     blanks=blanks)  # fmt: skip
        reader._check()
        return reader

    def _check(self) -> None:
        """Raise InputError if the first rows are not JSONL or lack columns."""
        lines = [line for _, _, line in self._lines(0, min(_INSPECTED, self.rows))]
        if lines and lines[0].lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
            raise InputError(
                f"source.paths: {self.name} is one JSON list, not JSONL, which has an object a line: "
                f"jq -c '.[]' {self.name} > NEW.jsonl"
            )
        values = [_values(line) for line in lines]
        rows = [row for row in values if isinstance(row, dict)]
        if lines and not rows:
            raise InputError(f"source.paths: {self.name} is no JSONL: none of its first rows is read: {values[0]}")
        if rows:
            self.columns.check_rows(self.name, rows)

    def read(self, first: int, last: int) -> Iterator[TextDocument]:
        """Rows `first` up to, not including, `last`. Raises InputError."""
        check_size(self.place, self.name, self.size)
        for row, number, line in self._lines(first, last):
            yield self.columns.document(self.name, row, _values(line), f"line {number}")

    def _lines(self, first: int, last: int) -> Iterator[tuple[int, int, bytes]]:
        """Rows, from 0, with their line numbers, from 1."""
        if first >= last:
            return
        mark = first // _MARKED
        begin = mark * _MARKED
        found: Iterator[tuple[int, tuple[int, bytes]]]
        if self.place.endswith(COMPRESSED):
            found = self._sequence.read(first, last)
        else:
            found = enumerate(self._from(self.marks[mark], begin + self.blanks[mark]), start=begin)
        for row, (number, line) in found:
            if row >= first:
                yield row, number, line
            if row + 1 >= last:
                return

    def _from(self, position: int, number: int) -> Iterator[tuple[int, bytes]]:
        """The rows from a byte on, with their line numbers; `number`: lines before it."""
        try:
            with open_plain(self.place) as file:
                if position:
                    file.seek(position)
                for line in file:
                    number += 1
                    if not _is_blank(line):
                        yield number, line
        except Exception as error:  # as above
            raise InputError(f"{self.name}: cannot be read: {first_line(error)}") from None


def _is_blank(line: bytes) -> bool:
    return line.isspace() or line.strip() == _BOM


def _values(line: bytes) -> dict[str, Any] | ValueError:
    """The columns of a row, or the error."""
    try:
        values = json.loads(line.rstrip())
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON: {first_line(error)}")
    if not isinstance(values, dict):
        return ValueError(f"not an object with columns: {line[:40]!r}")
    return values
