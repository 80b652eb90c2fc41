"""Parquet files, local or at a URL: of a range's row groups, only the columns that are used are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import fsspec

from lcm_ds.errors import InputError, first_line
from lcm_ds.text.base import TextDocument
from lcm_ds.text.columns import Columns, RowsFile, rows_of
from lcm_ds.text.files import check_size, size_of, stamp

# Rows decoded at a time: few enough for very long documents, enough that pyarrow's share of the time is small.
_ROWS = 256
_BUFFER_BYTES = 1 << 20  # that pyarrow reads of a column at a time


@dataclass(kw_only=True, eq=False)
class ParquetFile(RowsFile):
    """A file; groups: the rows of each of its row groups."""

    groups: list[int]
    rows: int = field(init=False)

    def __post_init__(self) -> None:
        self.rows = sum(self.groups)

    @classmethod
    def inspect(cls, columns: Columns, place: str, name: str) -> ParquetFile:
        """The file, from its footer. Raises InputError if it is not parquet or columns are missing."""
        file = open_parquet(place, name)
        columns.check_schema(name, file.schema_arrow)
        meta = file.metadata
        groups = [meta.row_group(index) for index in range(meta.num_row_groups)]
        texts = [file.schema_arrow.names.index(name) for name in columns.config.text_columns]
        flat = meta.num_columns == len(file.schema_arrow.names)  # else columns of the footer are leaves of nested ones
        characters = sum(
            sum(g.column(column).total_uncompressed_size for column in texts) if flat else g.total_byte_size
            for g in groups
        )
        rows = [group.num_rows for group in groups]
        return cls(columns=columns, place=place, name=name, size=size_of(place), characters=characters, groups=rows)

    def pieces(self, size: int) -> Iterator[int]:
        """Rows of the row groups; one of far more than `size` in even parts."""
        for rows in self.groups:
            parts = round(rows / size) if rows > 2 * size else 1
            yield from (rows * (part + 1) // parts - rows * part // parts for part in range(parts))

    def read(self, first: int, last: int) -> Iterator[TextDocument]:
        """Rows `first` up to, not including, `last`. Raises InputError."""
        check_size(self.place, self.name, self.size)
        for row, values in self._values(first, last):
            yield self.columns.document(self.name, row, values)

    def _values(self, first: int, last: int) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
        """The rows with their indices, from the row groups that hold them."""
        groups, row, begin = [], None, 0
        for index, rows in enumerate(self.groups):
            if begin < last and begin + rows > first:
                groups.append(index)
                row = begin if row is None else row
            begin += rows
        if row is None:
            return
        file = open_parquet(self.place, self.name)
        try:
            batches = file.iter_batches(_ROWS, row_groups=groups, columns=self.columns.names, use_threads=False)
            for batch in batches:
                if row + batch.num_rows > first:
                    for values in rows_of(batch.slice(max(0, first - row), last - max(first, row))):
                        yield max(first, row), values
                        first = max(first, row) + 1
                row += batch.num_rows
                if first >= last:
                    return
        except Exception as error:  # pyarrow's, and what the libraries of remote places raise
            raise InputError(f"{self.name}: cannot be read: {first_line(error)}") from None


def open_parquet(place: str, name: str) -> Any:
    """A parquet file at a path or URL, kept open; `name` is for messages. Raises InputError if it cannot be read."""
    return _opened(place, name, stamp(place))


@lru_cache(maxsize=4)
def _opened(place: str, name: str, stamp: tuple[int, int] | None) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{name}: reading parquet needs: pip install 'lcm-ds[prepare]'") from None
    try:
        if "://" not in place:
            # With a buffer, columns are read piece by piece: row groups may be larger than the memory. `pre_buffer`,
            # which is on by default, would read a range's row groups before the first row.
            return pyarrow.parquet.ParquetFile(place, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        # Of remote files pyarrow requests what a range needs in few large pieces; reading ahead would be wasted.
        filesystem, path = fsspec.core.url_to_fs(place)
        return pyarrow.parquet.ParquetFile(filesystem.open(path, "rb", cache_type="none"), pre_buffer=True)
    except Exception as error:
        raise InputError(f"{name}: not a parquet file that can be read: {first_line(error)}") from None
