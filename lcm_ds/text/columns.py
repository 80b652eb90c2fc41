"""Rows → documents: the columns to read, the rows to refuse, and errors in a file's columns."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from lcm_ds.config import SourceConfig
from lcm_ds.errors import InputError, first_line
from lcm_ds.text.base import UNREADABLE, TextDocument


class Columns:
    """The columns of a source. language: the value that the language column has to have, in any case."""

    def __init__(self, config: SourceConfig, language: str) -> None:
        self.config, self.language = config, language.lower()
        named = [*config.text_columns, config.id_column, config.language_column, *config.filter]
        self.names = list(dict.fromkeys(name for name in named if name is not None))

    def document(
        self, part: str, row: int, values: dict[str, Any] | ValueError, row_name: str | None = None
    ) -> TextDocument:
        """The document in a row.

        Args:
            part: Its file or dataset.
            row: Its index in that.
            values: Its columns, or why they cannot be read.
            row_name: For messages, if not `row N`.

        Returns:
            The document; a refused one for a row that cannot be read.
        """
        config = self.config
        id = values.get(config.id_column) if config.id_column is not None and isinstance(values, dict) else None
        named, id = id is not None, f"{part}#{row}" if id is None else str(id)
        try:
            if isinstance(values, ValueError):
                raise values
            refused = self._refused(values)
            if refused is not None:
                return TextDocument(id, part, "", refused)
            text, *target = (self._text(name, values) for name in config.text_columns)
        except ValueError as error:
            problem = f"{part}: {row_name or f'row {row}'}: {first_line(error)}"
            return TextDocument(id, part, "", UNREADABLE, problem=problem)
        return TextDocument(id, part, text, target=target[0] if target else None, named=named)

    def _text(self, name: str, values: dict[str, Any]) -> str | list[str]:
        """The text in a column of a row. Raises ValueError if it is not a text."""
        if name not in values:
            raise ValueError(f"has no {name!r}")
        value = values[name]
        if value is None or isinstance(value, str):
            return value or ""
        if self.config.supervised and isinstance(value, list) and all(isinstance(one, str) for one in value):
            return [sentence for one in value if (sentence := " ".join(one.split()))]
        raise ValueError(f"{name!r} is {value!r:.60}, not {self._expected}")

    @property
    def _expected(self) -> str:
        """The type of a column of texts, for messages."""
        return "strings or lists of them" if self.config.supervised else "strings"

    def _refused(self, values: dict[str, Any]) -> str | None:
        """Why the source refuses a row, None if it does not."""
        for name, limits in self.config.filter.items():
            value = values.get(name)
            if not isinstance(value, (int, float)) or math.isnan(value):
                return "filtered"
            if (limits.min is not None and value < limits.min) or (limits.max is not None and value > limits.max):
                return "filtered"
        column = self.config.language_column
        if column is not None and str(values.get(column)).lower() != self.language:
            return "language"
        return None

    def check_schema(self, part: str, schema: Any) -> None:
        """Raise InputError with a line for each column that is missing or of the wrong type; a pyarrow schema."""
        import pyarrow

        errors = self._missing(part, schema.names)
        config, types = self.config, pyarrow.types
        for key, name in self._text_keys():
            if name in schema.names:
                kind = column_type = schema.field(name).type
                if config.supervised and (types.is_list(kind) or types.is_large_list(kind)):
                    kind = kind.value_type
                if types.is_dictionary(kind):  # what pandas and polars call categories
                    kind = kind.value_type
                strings = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
                if not any(is_kind(kind) for is_kind in strings):
                    errors.append(f"source.{key}: {name!r} of {part} holds {column_type}, not {self._expected}")
        for name in config.filter:
            if name in schema.names:
                kind = schema.field(name).type
                if not (types.is_integer(kind) or types.is_floating(kind)):
                    errors.append(f"source.filter: {name!r} of {part} holds {kind}, not numbers")
        if errors:
            raise InputError(errors)

    def check_rows(self, part: str, rows: Sequence[dict[str, Any]]) -> None:
        """The same for rows without a schema: a column exists if any row has it.

        A text column has the wrong type only if it holds no text in any row; single rows are refused when they are
        read.
        """
        errors = self._missing(part, {name: None for row in rows for name in row})
        texts = (str, list) if self.config.supervised else (str,)
        wanted: list[tuple[str, str, tuple[type, ...], str]] = [
            (key, name, texts, self._expected) for key, name in self._text_keys()
        ]
        wanted += [("filter", name, (int, float), "numbers") for name in self.config.filter]
        for key, name, kinds, meant in wanted:
            present = [value for row in rows if (value := row.get(name)) is not None]
            wrong = [value for value in present if not isinstance(value, kinds)]
            if wrong and (key == "filter" or len(wrong) == len(present)):
                errors.append(f"source.{key}: {name!r} of {part} holds {wrong[0]!r:.60}, not {meant}")
        if errors:
            raise InputError(errors)

    def _text_keys(self) -> list[tuple[str, str]]:
        """The columns of texts with the keys that name them."""
        keys = ("source_column", "target_column") if self.config.supervised else ("text_column",)
        return [*zip(keys, self.config.text_columns, strict=True)]

    def _missing(self, part: str, names: Collection[str]) -> list[str]:
        """A line for each missing column."""
        listed, config = ", ".join(names), self.config
        keys = {**dict(self._text_keys()), "id_column": config.id_column, "language_column": config.language_column}
        wanted: Sequence[tuple[str, str | None]] = [*keys.items(), *(("filter", name) for name in config.filter)]
        errors = []
        for key, name in wanted:
            if name is not None and name not in names:
                hint = " (null: documents are named by file and row)" if key == "id_column" else ""
                errors.append(f"source.{key}: {part} has no column {name!r}; its columns: {listed}{hint}")
        return errors


def rows_of(table: Any) -> Iterator[dict[str, Any] | ValueError]:
    """The rows of an Arrow table or batch; the error instead of a row whose text is not UTF-8."""
    try:
        rows = table.to_pylist()
    except UnicodeDecodeError as error:
        if table.num_rows == 1:
            yield error
            return
        rows = (row for i in range(table.num_rows) for row in rows_of(table.slice(i, 1)))
    yield from rows
