"""Files that hold concepts: parquet by row groups, Arrow files (Hugging Face datasets on disk) by record batches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Protocol

from lcm_ds.adopt.columns import Block, Columns, block_of, described, rows_between
from lcm_ds.adopt.lists import first_width, itemsize_of, width_of
from lcm_ds.config import SourceConfig
from lcm_ds.errors import InputError, first_line
from lcm_ds.text.files import check_size
from lcm_ds.text.parquet import open_parquet

BLOCK_BYTES = 4 << 20  # of the rows that are in memory at a time; more is slower: it leaves the processor's caches
_BUFFER_BYTES = 1 << 20  # that pyarrow reads of a column at a time


class Part(Protocol):
    """A file, or a folder of .npy files.

    place: path or URL; name: for messages and ids; size: bytes; split: the one that its folder names, if any; groups:
    the rows of each of its groups, the smallest parts that are read without reading others; together: whether a group
    is read from its beginning, so that it is not worth sharing; supervised: whether it has concepts of sources and of
    targets; itemsize: bytes of a number; width: numbers in a concept, None if it holds none.
    """

    place: str
    name: str
    size: int
    split: str | None
    groups: list[int]
    together: bool
    supervised: bool
    itemsize: int
    width: int | None

    def read(self, group: int, first: int, last: int) -> Iterator[Block]:
        """Rows `first` up to, not including, `last` of a group. Raises InputError if the file cannot be read."""

    def index(self) -> dict[str, Any]:
        """The arguments of the constructor."""

    def described(self) -> dict[str, Any] | None:
        """What export-data wrote about the dataset; None in other files."""


class ParquetPart:
    """A parquet file, here or at a URL."""

    together = True

    def __init__(
        self,
        place: str,
        name: str,
        size: int,
        split: str | None,
        columns: dict[str, Any],
        groups: list[int],
        row_bytes: int,
        itemsize: int,
        width: int | None,
    ) -> None:
        self.place, self.name, self.size, self.split = place, name, size, split
        self.columns, self.groups, self.row_bytes = Columns(**columns), groups, row_bytes
        self.itemsize, self.width, self.supervised = itemsize, width, len(self.columns.concepts) == 2

    @classmethod
    def inspect(cls, config: SourceConfig, place: str, name: str, split: str | None) -> ParquetPart:
        """The file, by its footer.

        Args:
            config: The block `source`.
            place: Its path or URL.
            name: For messages and ids.
            split: The one that its folder names.

        Returns:
            The part.

        Raises:
            InputError: It is not parquet, or has not the columns.
        """
        file, size = _parquet(place, name)
        columns = Columns.of(config, name, file.schema_arrow)
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        rows = [group.num_rows for group in groups]
        row_bytes = sum(group.total_byte_size for group in groups) // max(1, sum(rows))
        width = _one_width(columns, file.schema_arrow, name)
        for group in range(file.num_row_groups) if width is None else ():
            for batch in file.iter_batches(16, row_groups=[group], columns=columns.concepts):
                if width is None:
                    width = next((found for column in batch.columns if (found := first_width(column))), None)
            if width is not None:
                break
        return cls(
            place, name, size, split, columns.index(), rows, row_bytes, _itemsize(columns, file.schema_arrow), width
        )

    def read(self, group: int, first: int, last: int) -> Iterator[Block]:
        """As in Part."""
        check_size(self.place, self.name, self.size)
        file, _ = _parquet(self.place, self.name)
        rows = max(1, min(1024, BLOCK_BYTES // max(1, self.row_bytes)))
        assert self.width is not None
        try:
            batches = file.iter_batches(rows, row_groups=[group], columns=self.columns.names, use_threads=False)
            for batch in rows_between(batches, first, last):
                yield block_of(batch, self.columns, self.width)
        except Exception as error:  # pyarrow's, and what the libraries of remote places raise
            raise InputError(f"{self.name}: cannot be read: {first_line(error)}") from None

    def index(self) -> dict[str, Any]:
        """As in Part."""
        return {"place": self.place, "name": self.name, "size": self.size, "split": self.split,
                "columns": self.columns.index(), "groups": self.groups, "row_bytes": self.row_bytes,
                "itemsize": self.itemsize, "width": self.width}  # fmt: skip

    def described(self) -> dict[str, Any] | None:
        """As in Part."""
        return described(_parquet(self.place, self.name)[0].schema_arrow)


class ArrowPart:
    """A file of Arrow record batches on this machine, as `save_to_disk` and the cache of datasets have them."""

    together = False

    def __init__(
        self,
        place: str,
        name: str,
        size: int,
        split: str | None,
        columns: dict[str, Any],
        groups: list[int],
        itemsize: int,
        width: int | None,
    ) -> None:
        self.place, self.name, self.size, self.split = place, name, size, split
        self.columns, self.groups = Columns(**columns), groups
        self.itemsize, self.width, self.supervised = itemsize, width, len(self.columns.concepts) == 2

    @classmethod
    def inspect(cls, config: SourceConfig, place: str, name: str, split: str | None) -> ArrowPart:
        """The file, by the headers of its batches; arguments and errors as of ParquetPart."""
        batches, schema = _arrow(place, name)
        columns = Columns.of(config, name, schema)
        width = _one_width(columns, schema, name)
        for batch in batches:
            if width is not None:
                break
            width = next((found for one in columns.concepts if (found := first_width(batch.column(one)))), None)
        rows = [batch.num_rows for batch in batches]
        size = os.path.getsize(place)
        return cls(place, name, size, split, columns.index(), rows, _itemsize(columns, schema), width)

    def read(self, group: int, first: int, last: int) -> Iterator[Block]:
        """As in Part."""
        check_size(self.place, self.name, self.size)
        batch = _arrow(self.place, self.name)[0][group]
        rows = max(1, min(1024, BLOCK_BYTES // max(1, batch.nbytes // max(1, batch.num_rows))))
        assert self.width is not None
        for start in range(first, last, rows):
            yield block_of(batch.slice(start, min(rows, last - start)), self.columns, self.width)

    def index(self) -> dict[str, Any]:
        """As in Part."""
        return {"place": self.place, "name": self.name, "size": self.size, "split": self.split,
                "columns": self.columns.index(), "groups": self.groups, "itemsize": self.itemsize,
                "width": self.width}  # fmt: skip

    def described(self) -> dict[str, Any] | None:
        """As in Part."""
        return described(_arrow(self.place, self.name)[1])


def _itemsize(columns: Columns, schema: Any) -> int:
    return max(itemsize_of(schema.field(name).type) for name in columns.concepts)


def _one_width(columns: Columns, schema: Any, name: str) -> int | None:
    """Numbers in a concept by the types of columns, None if they leave it open. Raises InputError if they differ."""
    widths = {column: width_of(schema.field(column).type) for column in columns.concepts}
    known = {width for width in widths.values() if width is not None}
    if len(known) > 1:
        raise InputError(f"{name}: its columns of concepts have different sizes: {widths}")
    return next(iter(known), None)


def stamp(place: str) -> tuple[int, int] | None:
    """Bytes and time of change of a local file, by which one that is kept open is known; None if it is not there."""
    try:
        status = os.stat(place)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _parquet(place: str, name: str) -> tuple[Any, int]:
    """A parquet file, kept open, and its bytes. Raises InputError."""
    return _open_parquet(place, name, stamp(place))


def _arrow(place: str, name: str) -> tuple[list[Any], Any]:
    """The record batches of a file, mapped into memory, and their schema. Raises InputError."""
    return _open_arrow(place, name, stamp(place))


@lru_cache(maxsize=4)
def _open_parquet(place: str, name: str, stamp: tuple[int, int] | None) -> tuple[Any, int]:
    import pyarrow.parquet

    if "://" in place:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(place)
        return open_parquet(place, name), int(filesystem.size(path))
    try:
        # With a buffer, a column is read piece by piece: row groups may be larger than the memory.
        file = pyarrow.parquet.ParquetFile(place, buffer_size=_BUFFER_BYTES)
    except Exception as error:
        raise InputError(f"{name}: not a parquet file that can be read: {first_line(error)}") from None
    return file, os.path.getsize(place)


@lru_cache(maxsize=4)
def _open_arrow(place: str, name: str, stamp: tuple[int, int] | None) -> tuple[list[Any], Any]:
    import pyarrow

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
