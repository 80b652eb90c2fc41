"""Datasets of the datasets library on a disk: a folder of `save_to_disk`, or a file of Arrow record batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from lcm_ds.errors import InputError, first_line
from lcm_ds.text.base import TextDocument
from lcm_ds.text.columns import Columns, RowsFile, rows_of
from lcm_ds.text.files import stamp

_ROWS = 256  # decoded at a time


@dataclass(kw_only=True, eq=False)
class SavedDataset(RowsFile):
    """A dataset, memory-mapped; size: the bytes of its columns."""

    @classmethod
    def inspect(cls, columns: Columns, place: str, name: str) -> SavedDataset:
        """The dataset. Raises InputError if it cannot be read, or has no such split or columns."""
        file = cls(columns=columns, place=place, name=name)
        stored, file.rows = file._stored, len(file._rows)
        columns.check_schema(name, stored.schema)
        file.size = stored.nbytes
        texts = sum(stored.column(text).nbytes for text in columns.config.text_columns)
        file.characters = round(texts * file.rows / max(1, stored.num_rows))  # rows may be selected from more
        return file

    def read(self, first: int, last: int) -> Iterator[TextDocument]:
        """Rows `first` up to, not including, `last`. Raises InputError."""
        if len(self._rows) != self.rows:
            raise InputError(
                f"{self.name}: has {len(self._rows)} rows, but had {self.rows} when the source was looked at: restore "
                "it, or choose a new output"
            )
        names = [name for name in self.columns.names if name in self._stored.column_names]
        for start in range(first, last, _ROWS):
            table = self._part(start, min(start + _ROWS, last)).select(names)
            for row, values in enumerate(rows_of(table), start=start):
                yield self.columns.document(self.name, row, values)

    @cached_property
    def _rows(self) -> Any:
        """The table of a file, or the dataset of a folder."""
        if not Path(self.place).is_dir():
            import pyarrow

            return pyarrow.Table.from_batches(*open_arrow(self.place, self.name))
        try:
            import datasets

            found = datasets.load_from_disk(self.place)
        except ImportError:
            raise InputError(f"{self.name}: reading datasets needs: pip install 'lcm-ds[prepare]'") from None
        except Exception as error:  # of many kinds
            raise InputError(f"{self.name}: cannot be read: {first_line(error)}") from None
        split = self.columns.config.split
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise InputError(f"source.split: {self.place} has no split {split!r}; it has {', '.join(found)}")
            found = found[split]
        return found.with_format("arrow")

    @property
    def _stored(self) -> Any:
        """The table that the rows are from; of a dataset with selected rows it has more."""
        return self._rows.data if Path(self.place).is_dir() else self._rows

    def _part(self, first: int, last: int) -> Any:
        """Rows as a table."""
        return self._rows[first:last] if Path(self.place).is_dir() else self._rows.slice(first, last - first)


def open_arrow(place: str, name: str) -> tuple[list[Any], Any]:
    """The record batches of a file, mapped into memory, and their schema; `name` is for messages. Raises InputError."""
    return _opened(place, name, stamp(place))


@lru_cache(maxsize=4)
def _opened(place: str, name: str, stamp: tuple[int, int] | None) -> tuple[list[Any], Any]:
    try:
        import pyarrow
    except ImportError:
        raise InputError(f"{name}: reading Arrow files needs: pip install 'lcm-ds[prepare]'") from None
    try:
        data = pyarrow.memory_map(place)
        try:
            reader = pyarrow.ipc.open_stream(data)
            return list(reader), reader.schema
        except pyarrow.ArrowInvalid:
            file = pyarrow.ipc.open_file(data)
            return [file.get_batch(index) for index in range(file.num_record_batches)], file.schema
    except Exception as error:
        raise InputError(f"{name}: not a file of Arrow batches that can be read: {first_line(error)}") from None
