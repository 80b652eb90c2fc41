"""Files that hold concepts: parquet by row groups, Arrow files (Hugging Face datasets on disk) by record batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from lcm_ds.adopt.columns import Block, Columns, block_of, described, rows_between
from lcm_ds.adopt.lists import first_width, itemsize_of, width_of
from lcm_ds.config import SourceConfig
from lcm_ds.errors import InputError, first_line
from lcm_ds.text.files import check_size, size_of
from lcm_ds.text.parquet import open_parquet
from lcm_ds.text.saved import open_arrow

BLOCK_BYTES = 2 << 20  # of the rows that are in memory at a time; more is slower: it leaves the processor's caches


class Part(Protocol):
    """A file, or a folder of .npy files.

    place: path or URL; name: for messages and ids; size: bytes; split: the one that its folder names, if any; groups:
    the rows of each of its groups, the smallest parts that are read without reading others; together: whether a group
    is read from its beginning, so that it is not worth sharing; itemsize: bytes of a number; width: numbers in a
    concept, None if it holds none.
    """

    place: str
    name: str
    size: int
    split: str | None
    groups: list[int]
    together: bool
    itemsize: int
    width: int | None

    @property
    def supervised(self) -> bool:
        """Whether it has concepts of sources and of targets."""

    @property
    def group_column(self) -> str | None:
        """Where it has the documents' groups."""

    def read(self, group: int, first: int, last: int) -> Iterator[Block]:
        """Rows `first` up to, not including, `last` of a group. Raises InputError if the file cannot be read."""

    def index(self) -> dict[str, Any]:
        """The arguments of the constructor."""

    def described(self) -> dict[str, Any] | None:
        """What export-data wrote about the dataset; None in other files."""


@dataclass(kw_only=True, eq=False)
class TablePart:
    """What both kinds of tables have; see Part. row_bytes: of a row in memory, on average."""

    place: str
    name: str
    size: int
    split: str | None
    columns: Columns
    groups: list[int]
    row_bytes: int
    itemsize: int
    width: int | None

    def __post_init__(self) -> None:
        if isinstance(self.columns, dict):  # of an index
            self.columns = Columns(**self.columns)

    @property
    def supervised(self) -> bool:
        """As in Part."""
        return len(self.columns.concepts) == 2

    @property
    def group_column(self) -> str | None:
        """As in Part."""
        return self.columns.group

    @property
    def block_rows(self) -> int:
        """Rows that are in memory at a time."""
        return max(1, min(1024, BLOCK_BYTES // max(1, self.row_bytes)))

    def block(self, batch: Any) -> Block:
        """The rows of an Arrow batch."""
        assert self.width is not None
        return block_of(batch, self.columns, self.width)

    def index(self) -> dict[str, Any]:
        """As in Part."""
        return asdict(self)


class ParquetPart(TablePart):
    """A parquet file, here or at a URL."""

    together = True

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
        file = open_parquet(place, name)
        columns = Columns.of(config, name, file.schema_arrow)
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        rows = [group.num_rows for group in groups]
        batches = (batch for group in range(file.num_row_groups)
                   for batch in file.iter_batches(16, row_groups=[group], columns=columns.concepts))  # fmt: skip
        return cls(
            place=place,
            name=name,
            size=size_of(place),
            split=split,
            columns=columns,
            groups=rows,
            row_bytes=sum(group.total_byte_size for group in groups) // max(1, sum(rows)),
            itemsize=_itemsize(columns, file.schema_arrow),
            width=_width(columns, file.schema_arrow, name, batches),
        )

    def read(self, group: int, first: int, last: int) -> Iterator[Block]:
        """As in Part."""
        check_size(self.place, self.name, self.size)
        file = open_parquet(self.place, self.name)
        try:
            batches = file.iter_batches(
                self.block_rows, row_groups=[group], columns=self.columns.names, use_threads=False
            )
            for batch in rows_between(batches, first, last):
                yield self.block(batch)
        except Exception as error:  # pyarrow's, and what the libraries of remote places raise
            raise InputError(f"{self.name}: cannot be read: {first_line(error)}") from None

    def described(self) -> dict[str, Any] | None:
        """As in Part."""
        return described(open_parquet(self.place, self.name).schema_arrow)


class ArrowPart(TablePart):
    """A file of Arrow record batches on this machine, as `save_to_disk` and the cache of datasets have them."""

    together = False

    @classmethod
    def inspect(cls, config: SourceConfig, place: str, name: str, split: str | None) -> ArrowPart:
        """The file, by the headers of its batches; arguments and errors as of ParquetPart."""
        batches, schema = open_arrow(place, name)
        columns = Columns.of(config, name, schema)
        rows = [batch.num_rows for batch in batches]
        return cls(
            place=place,
            name=name,
            size=size_of(place),
            split=split,
            columns=columns,
            groups=rows,
            row_bytes=sum(batch.nbytes for batch in batches) // max(1, sum(rows)),
            itemsize=_itemsize(columns, schema),
            width=_width(columns, schema, name, (batch.select(columns.concepts) for batch in batches)),
        )

    def read(self, group: int, first: int, last: int) -> Iterator[Block]:
        """As in Part."""
        check_size(self.place, self.name, self.size)
        batch = open_arrow(self.place, self.name)[0][group]
        for start in range(first, last, self.block_rows):
            yield self.block(batch.slice(start, min(self.block_rows, last - start)))

    def described(self) -> dict[str, Any] | None:
        """As in Part."""
        return described(open_arrow(self.place, self.name)[1])


def _itemsize(columns: Columns, schema: Any) -> int:
    return max(itemsize_of(schema.field(name).type) for name in columns.concepts)


def _width(columns: Columns, schema: Any, name: str, batches: Iterable[Any]) -> int | None:
    """Numbers in a concept: by the types of the columns, or else of the first concept; None if there is none.

    Args:
        columns: Of the part.
        schema: Its Arrow schema.
        name: The part, for messages.
        batches: Its columns of concepts, in Arrow batches.

    Raises:
        InputError: The columns have different sizes.
    """
    widths = {column: width_of(schema.field(column).type) for column in columns.concepts}
    known = {width for width in widths.values() if width is not None}
    if len(known) > 1:
        raise InputError(f"{name}: its columns of concepts have different sizes: {widths}")
    if known:
        return known.pop()
    return next((width for batch in batches for column in batch.columns if (width := first_width(column))), None)
