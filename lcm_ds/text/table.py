"""CSV and TSV files, here or at a URL, plain or compressed: a header, then a document a row, read by pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcm_ds.errors import InputError, first_line
from lcm_ds.text.base import Sequential, TextDocument
from lcm_ds.text.columns import Columns, RowsFile
from lcm_ds.text.files import check_size, open_plain, size_of

_BLOCK = 16 << 20  # bytes parsed at a time; a row has to fit


@dataclass(kw_only=True, eq=False)
class TableFile(RowsFile):
    """A file. Texts may hold line ends between quotes, so it is read from its beginning."""

    def __post_init__(self) -> None:
        self._sequence = Sequential(self._open)

    @classmethod
    def inspect(cls, columns: Columns, place: str, name: str) -> TableFile:
        """The file, read once to count its rows. Raises InputError if it cannot be read or columns are missing."""
        file = cls(columns=columns, place=place, name=name)
        try:
            file.size = size_of(place)
            columns.check_names(name, file._reader().schema.names)
        except InputError:
            raise
        except Exception as error:  # pyarrow's, and what the libraries of compression and of remote places raise
            raise InputError(f"{name}: cannot be read: {first_line(error)}") from None
        for values in file._open():
            file.rows += 1
            if isinstance(values, dict):
                file.characters += sum(len(values.get(text) or "") for text in columns.config.text_columns)
        return file

    def read(self, first: int, last: int) -> Iterator[TextDocument]:
        """Rows `first` up to, not including, `last`. Raises InputError."""
        check_size(self.place, self.name, self.size)
        for row, values in self._sequence.read(first, last):
            yield self.columns.document(self.name, row, values)

    def _open(self) -> Iterator[dict[str, Any] | ValueError]:
        """All rows: their columns, or why they cannot be read."""
        invalid: dict[int, ValueError] = {}
        row = 0
        try:
            present = self._reader().schema.names
            for batch in self._reader([name for name in self.columns.names if name in present], invalid):
                for values in batch.to_pylist():
                    while row in invalid:
                        yield invalid.pop(row)
                        row += 1
                    yield self._values(values)
                    row += 1
            while row in invalid:
                yield invalid.pop(row)
                row += 1
        except Exception as error:  # as above
            raise InputError(f"{self.name}: cannot be read: {first_line(error)}") from None

    def _values(self, values: dict[str, bytes]) -> dict[str, Any] | ValueError:
        """The columns of a row; those of the filter as numbers, if they are."""
        try:
            texts: dict[str, Any] = {name: value.decode() for name, value in values.items()}
        except UnicodeDecodeError as error:
            return error
        for name in self.columns.config.filter:
            try:
                texts[name] = float(texts[name])
            except ValueError:
                texts[name] = None
        return texts

    def _reader(self, names: list[str] | None = None, invalid: dict[int, ValueError] | None = None) -> Any:
        """pyarrow's reader of some columns, as bytes; by default of all.

        invalid: filled with the rows that have another number of columns than the header; pyarrow passes over them.
        """
        import pyarrow
        import pyarrow.csv as csv

        def skip(row: Any) -> str:
            if invalid is not None:  # its number counts the header, and from 1
                found = f"has {row.actual_columns} columns, the header {row.expected_columns}"
                invalid[row.number - 2] = ValueError(found)
            return "skip"

        tabs = ".tsv" in Path(self.name).suffixes
        return csv.open_csv(
            open_plain(self.place),
            read_options=csv.ReadOptions(use_threads=False, block_size=_BLOCK),
            parse_options=csv.ParseOptions(
                delimiter="\t" if tabs else ",", newlines_in_values=True, invalid_row_handler=skip
            ),
            convert_options=csv.ConvertOptions(
                include_columns=names, column_types=dict.fromkeys(names or (), pyarrow.binary())
            ),
        )
