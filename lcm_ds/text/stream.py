"""Hub datasets that are not parquet, streamed through the datasets library from the beginning to the range."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lcm_ds.errors import InputError, first_line
from lcm_ds.text.base import TextDocument
from lcm_ds.text.columns import Columns, rows_of

_ROWS = 256


class Stream:
    """The rows of a hub dataset. A later range continues after the last one, an earlier one starts over.

    revision: of the dataset, the same for all processes. inspect: read the first rows now, so that a missing column is
    found before an hour is lost. Raises InputError.
    """

    def __init__(self, columns: Columns, revision: str | None, inspect: bool) -> None:
        self.columns, self.revision = columns, revision
        self._rows: Iterator[tuple[int, dict[str, Any] | ValueError]] | None = None
        self._next = 0
        if inspect:
            self._rows = self._open()

    def read(self, first: int, last: int | None) -> Iterator[TextDocument]:
        """Rows `first` up to, not including, `last`; fewer or none if the dataset ends before."""
        if self._rows is None or self._next > first:
            self._rows, self._next = self._open(), 0
        name = str(self.columns.config.dataset)
        while last is None or self._next < last:
            item = next(self._rows, None)
            if item is None:
                return
            row, values = item
            self._next = row + 1
            if row >= first:
                yield self.columns.document(name, row, values)

    def _open(self) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
        import datasets

        config = self.columns.config
        name = str(config.dataset)
        try:
            dataset = datasets.load_dataset(
                name, name=config.config, revision=self.revision, split=config.split, streaming=config.streaming
            )
            tables = dataset.with_format("arrow").iter(batch_size=_ROWS)
            first = next(tables, None)
        except Exception as error:  # many kinds, from many libraries
            raise InputError(f"source: {name}: cannot be opened: {first_line(error)}") from None
        if first is not None:
            self.columns.check_schema(name, first.schema)

        def rows() -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
            row, table = 0, first
            while table is not None:
                for values in rows_of(
                    table.select([name for name in self.columns.names if name in table.column_names])
                ):
                    yield row, values
                    row += 1
                try:
                    table = next(tables, None)
                except Exception as error:
                    raise InputError(f"{name}: cannot be read: {first_line(error)}") from None

        return rows()
