"""The source `huggingface`: a dataset of the hub, or local parquet and JSONL files, through the datasets library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcm_ds.config import SourceConfig
from lcm_ds.errors import InputError
from lcm_ds.text.files import expand
from lcm_ds.text.sources import TextDocument, window

# Rows read at a time: few enough for very long documents, enough that pyarrow's share of the time is small.
_ROWS_PER_TABLE = 256


@dataclass(frozen=True)
class _Part:
    """A file, or a whole dataset of the hub: its name in ids, what load_dataset wants, and its rows where known."""

    name: str
    arguments: dict[str, Any]
    rows: int | None = None


class HuggingFaceSource:
    """Rows of a dataset, in its own order; files follow one another in the order of their names.

    A row's id is its `id_column`; without one, or where it is null, the file's or the dataset's name and the row's
    number in it: `part-0.parquet#17`. A null text comes as an empty one.

    Raises InputError where a file, the dataset, or a column is missing, or a file is neither parquet nor JSONL.
    """

    def __init__(self, config: SourceConfig) -> None:
        try:
            import datasets  # noqa: F401
        except ImportError:
            raise InputError("the source huggingface needs: pip install 'lcm-ds[prepare]'") from None
        self.config = config
        self._parts = [_hub_part(config)] if config.dataset else _local_parts(config)
        # A first reader finds a missing column now, not after an hour; it is used for the first range.
        self._reader: _Reader | None = _Reader(config, self._parts, config.skip)

    @property
    def total(self) -> int | None:
        """How many documents there are; None where only reading all would tell (JSONL, some datasets of the hub)."""
        rows = [part.rows for part in self._parts]
        if None in rows:
            return None
        first, last = window(self.config, 0, None)
        known = sum(count for count in rows if count is not None)
        return max(0, (known if last is None else min(known, last)) - first)

    def documents(self, start: int = 0, stop: int | None = None) -> Iterator[TextDocument]:
        """Rows number `start` up to, not including, `stop`, after `skip`.

        The reader is kept where it stopped: a later range goes on from there instead of from the beginning.
        """
        first, last = window(self.config, start, stop)
        reader, self._reader = self._reader, None
        if reader is None or reader.position > first:
            reader = _Reader(self.config, self._parts, first)
        try:
            yield from reader.read(first, last)
        except Exception:
            reader = None
            raise
        finally:
            self._reader = reader

    def __iter__(self) -> Iterator[TextDocument]:
        return self.documents()

    def describe(self) -> dict[str, Any]:
        """What the documents were taken from, for dataset.json."""
        keys = {"dataset", "config", "split", "revision", "paths", "text_column", "id_column", "skip", "take"}
        chosen = self.config.model_dump(include=keys, exclude_none=True)
        return {"name": "huggingface", **{key: value for key, value in chosen.items() if value not in ([], 0)}}


class _Reader:
    """Reads rows onwards from `position`; it cannot go back."""

    def __init__(self, config: SourceConfig, parts: list[_Part], start: int) -> None:
        self.config = config
        self.position = start
        self._tables = self._read_tables(parts, start)
        self._part: str = ""
        self._row = 0
        self._table: Any = None
        self._next_table()

    def read(self, first: int, last: int | None) -> Iterator[TextDocument]:
        """Documents of the rows from `first` (not before `position`) to `last`."""
        while self._table is not None and (last is None or self.position < last):
            ahead = min(first - self.position, self._table.num_rows)
            if ahead > 0:
                self._advance(ahead)
                continue
            wanted = self._table.num_rows if last is None else min(self._table.num_rows, last - self.position)
            part, row = self._part, self._row
            texts = self._table.column(self.config.text_column).slice(0, wanted).to_pylist()
            ids = self._ids(wanted)
            for number, (id, text) in enumerate(zip(ids, texts, strict=True)):
                self._advance(1)
                id = f"{part}#{row + number}" if id is None else str(id)
                yield TextDocument(id, part, text if text is not None else "")

    def _ids(self, count: int) -> list[Any]:
        column = self.config.id_column
        return [None] * count if column is None else self._table.column(column).slice(0, count).to_pylist()

    def _advance(self, rows: int) -> None:
        """Leave `rows` rows of the present table behind, and take the next table when it is used up."""
        self.position += rows
        self._row += rows
        self._table = self._table.slice(rows)
        if not self._table.num_rows:
            self._next_table()

    def _next_table(self) -> None:
        """Take the next table; None is the end."""
        self._part, self._row, self._table = next(self._tables, ("", 0, None))

    def _read_tables(self, parts: list[_Part], start: int) -> Iterator[tuple[str, int, Any]]:
        """(part, number of the first row in it, pyarrow table) from row `start` on; no table is empty."""
        import pyarrow

        for part in parts:
            if part.rows is not None and part.rows <= start:
                start -= part.rows
                continue
            try:
                row = 0
                for table in _tables(part, self.config):
                    _check_columns(self.config, part.name, table.schema)
                    if row + table.num_rows > start:
                        yield part.name, max(row, start), table.slice(max(0, start - row))
                    row += table.num_rows
                start = max(0, start - row)
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                raise InputError(f"{part.name}: cannot be read: {_first_line(error)}") from None


def _tables(part: _Part, config: SourceConfig) -> Iterator[Any]:
    """The rows of a part as pyarrow tables, none of them empty."""
    import datasets

    try:
        dataset = datasets.load_dataset(split=config.split if config.dataset else "train", **part.arguments)
    except (OSError, ValueError) as error:
        # An OSError where it is missing or out of reach, a ValueError where it has no such config or split.
        raise InputError(f"source: {part.name}: cannot be opened: {_first_line(error)}") from None
    yield from dataset.with_format("arrow").iter(batch_size=_ROWS_PER_TABLE)


def _hub_part(config: SourceConfig) -> _Part:
    arguments = {
        "path": config.dataset,
        "name": config.config,
        "revision": config.revision,
        "streaming": config.streaming,
    }
    return _Part(str(config.dataset), arguments)


def _local_parts(config: SourceConfig) -> list[_Part]:
    """A part a file; every mistake in the files' names and in parquet files' columns in one InputError."""
    import pyarrow
    import pyarrow.parquet

    mistakes, parts = [], []
    files = expand(config.paths)
    common = os.path.commonpath([path.parent for path in files])
    for path in files:
        name, kind = Path(os.path.relpath(path, common)).as_posix(), _kind(path)
        arguments: dict[str, Any] = {"path": kind, "data_files": [str(path)], "streaming": config.streaming}
        rows = None
        if kind is None:
            mistakes.append(f"source.paths: {path}: neither parquet nor JSONL by its name")
        elif kind == "parquet":
            arguments["columns"] = [config.text_column] + ([config.id_column] if config.id_column else [])
            try:
                file = pyarrow.parquet.ParquetFile(path)
                _check_columns(config, name, file.schema_arrow)
                rows = file.metadata.num_rows
            except InputError as error:
                mistakes += error.mistakes
            except (pyarrow.ArrowException, OSError) as error:
                mistakes.append(f"{path}: not a parquet file that can be read: {_first_line(error)}")
        parts.append(_Part(name, arguments, rows))
    if mistakes:
        raise InputError(mistakes)
    return parts


def _kind(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".zst", ".bz2", ".xz")]
    kinds = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".ndjson": "json"}
    return kinds.get(suffixes[-1]) if suffixes else None


def _check_columns(config: SourceConfig, name: str, schema: Any) -> None:
    """Raise InputError naming the columns that are missing, and those that are there."""
    import pyarrow

    there = ", ".join(schema.names)
    mistakes = []
    if config.text_column not in schema.names:
        mistakes.append(f"source.text_column: {name} has no column {config.text_column!r}; its columns: {there}")
    else:
        kind = schema.field(config.text_column).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_null(kind)):
            mistakes.append(f"source.text_column: {config.text_column!r} of {name} holds {kind}, not strings")
    if config.id_column is not None and config.id_column not in schema.names:
        mistakes.append(
            f"source.id_column: {name} has no column {config.id_column!r}; its columns: {there} "
            "(null: documents are named by file and row)"
        )
    if mistakes:
        raise InputError(mistakes)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
