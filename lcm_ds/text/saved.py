"""Datasets of the datasets library on a disk: a folder of `save_to_disk`, or one of its .arrow files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from lcm_ds.errors import InputError, first_line
from lcm_ds.text.base import TextDocument
from lcm_ds.text.columns import Columns, rows_of

_ROWS = 256  # decoded at a time


class SavedDataset:
    """A dataset, memory-mapped; size: the bytes of its columns."""

    def __init__(self, columns: Columns, place: str, name: str, size: int, characters: int, rows: int) -> None:
        self.columns, self.place, self.name, self.size = columns, place, name, size
        self.characters, self.rows = characters, rows

    @classmethod
    def inspect(cls, columns: Columns, place: str, name: str) -> SavedDataset:
        """The dataset. Raises InputError if it cannot be read, or has no such split or columns."""
        file = cls(columns, place, name, 0, 0, 0)
        table = file._dataset.data
        columns.check_schema(name, table.schema)
        texts = sum(table.column(text).nbytes for text in columns.config.text_columns)
        share = len(file._dataset) / max(1, table.num_rows)  # rows may be selected from a larger table
        return cls(columns, place, name, table.nbytes, round(texts * share), len(file._dataset))

    @cached_property
    def _dataset(self) -> Any:
        try:
            import datasets

            if not Path(self.place).is_dir():
                return datasets.Dataset.from_file(self.place)
            found = datasets.load_from_disk(self.place)
        except ImportError:
            raise InputError(f"{self.name}: reading datasets needs: pip install 'lcm-ds[prepare]'") from None
        except Exception as error:  # of many kinds
            raise InputError(f"{self.name}: cannot be read: {first_line(error)}") from None
        split = self.columns.config.split
        if isinstance(found, datasets.Dataset):
            return found
        if split not in found:
            raise InputError(f"source.split: {self.place} has no split {split!r}; it has {', '.join(found)}")
        return found[split]

    def index(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {"place": self.place, "name": self.name, "size": self.size, "characters": self.characters,
                "rows": self.rows}  # fmt: skip

    def pieces(self, size: int) -> Iterator[int]:
        """Parts of `size` rows; a range may end after any row."""
        yield from (min(size, self.rows - start) for start in range(0, self.rows, size))

    def read(self, first: int, last: int) -> Iterator[TextDocument]:
        """Rows `first` up to, not including, `last`. Raises InputError."""
        arrow = self._dataset.with_format("arrow")
        if len(arrow) != self.rows:
            raise InputError(
                f"{self.name}: has {len(arrow)} rows, but had {self.rows} when the source was looked at: restore it, "
                "or choose a new output"
            )
        for start in range(first, last, _ROWS):
            table = arrow[start : min(start + _ROWS, last)]
            names = [name for name in self.columns.names if name in table.column_names]
            for row, values in enumerate(rows_of(table.select(names)), start=start):
                yield self.columns.document(self.name, row, values)
