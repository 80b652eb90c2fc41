"""Rows → documents: the columns to read, the rows to refuse, and errors in a file's columns."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lcm_ds.config import SourceConfig
from lcm_ds.errors import InputError, first_line
from lcm_ds.languages import closest, short_code, sonar_code
from lcm_ds.text.base import FILTERED, UNREADABLE, TextDocument
from lcm_ds.text.splitter import clean

# What a column of texts may hold, for messages.
TEXTS = "texts (string, large_string, string_view, a dictionary or category of them) or lists of them"
_OPTIONAL_ID = SourceConfig.model_fields["id_column"].default  # without it, documents are named by file and row


class Columns:
    """The columns of a source. language: what the language column has to name, unless the source has several."""

    def __init__(self, config: SourceConfig, language: str) -> None:
        self.config, self.language = config, language.lower()
        named = [*config.text_columns, config.id_column, config.group_column, config.language_column]
        named += [config.script_column, *config.filter]
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
        own, group = _name(values, config.id_column), _name(values, config.group_column)
        named, id = own is not None, f"{part}#{row}" if own is None else own
        try:
            if isinstance(values, ValueError):
                raise values
            refused = self._refused(values)
            language, other = self._language(values) if refused is None else (None, False)
            if refused is not None or other:
                return TextDocument(id, part, "", refused or "language")
            text, *target = (self._text(name, values) for name in config.text_columns)
        except ValueError as error:
            problem = f"{part}: {row_name or f'row {row}'}: {first_line(error)}"
            return TextDocument(id, part, "", UNREADABLE, problem=problem)
        target_text = target[0] if target else None
        return TextDocument(id, part, text, target=target_text, language=language, named=named, group=group)

    def _text(self, name: str, values: dict[str, Any]) -> str | list[str]:
        """The text in a column of a row. Raises ValueError if it is not a text."""
        if name not in values:
            raise ValueError(f"has no {name!r}")
        value = values[name]
        if value is None or isinstance(value, str):
            return value or ""
        if not isinstance(value, list):
            raise ValueError(f"{name!r} is {value!r:.60}, not {TEXTS}")
        for index, sentence in enumerate(value):
            if not isinstance(sentence, str):
                raise ValueError(f"{name!r} holds {sentence!r:.60} as item {index}, not a sentence")
        return [sentence for one in value if (sentence := clean(one))]

    def _language(self, values: dict[str, Any]) -> tuple[str | None, bool]:
        """The code of a row's language, if the source has several, and whether it is another than those wanted.

        Raises ValueError if all languages are wanted and SONAR does not know this one.
        """
        config = self.config
        if config.language_column is None:
            return None, False
        value = values.get(config.language_column)
        script = None if config.script_column is None else values.get(config.script_column)
        code = None if value is None else sonar_code(str(value), None if script is None else str(script))
        if config.languages is None:
            return None, not self._is_language(value, code)
        if code is None and config.languages == "all":
            named = f"{value!r}" if script is None else f"{value!r} in the script {script!r}"
            raise ValueError(
                f"{config.language_column!r} is {named}: SONAR has no such language{closest(str(value or ''))}"
            )
        return code, config.languages != "all" and code not in config.languages

    def _is_language(self, value: Any, code: str | None) -> bool:
        """Whether a value of the language column, with its code of SONAR, names the language of the sentences."""
        if str(value).lower() == self.language:
            return True
        return code is not None and (code == sonar_code(self.language) or short_code(code) == self.language)

    def _refused(self, values: dict[str, Any]) -> str | None:
        """Why the source refuses a row, None if it does not."""
        for name, limits in self.config.filter.items():
            value = values.get(name)
            if not isinstance(value, (int, float)) or math.isnan(value):
                return FILTERED
            if (limits.min is not None and value < limits.min) or (limits.max is not None and value > limits.max):
                return FILTERED
        return None

    def check_schema(self, part: str, schema: Any) -> None:
        """Raise InputError with a line for each column that is missing or of the wrong type; a pyarrow schema."""
        import pyarrow

        errors = self._missing(part, schema.names)
        config, types = self.config, pyarrow.types
        if len(set(schema.names)) < len(schema.names) and errors:
            raise InputError(errors)
        for key, name in self._text_keys():
            if name in schema.names:
                kind = schema.field(name).type
                if not _is_text(kind):
                    errors.append(f"source.{key}: {name!r} of {part} holds {kind}, not {TEXTS}")
        for name in config.filter:
            if name in schema.names:
                kind = schema.field(name).type
                if not (types.is_integer(kind) or types.is_floating(kind)):
                    errors.append(f"source.filter: {name!r} of {part} holds {kind}, not numbers")
        if errors:
            raise InputError(errors)

    def check_names(self, part: str, names: Collection[str]) -> None:
        """Raise InputError with a line for each column that is missing, of a file without types."""
        if errors := self._missing(part, names):
            raise InputError(errors)

    def check_rows(self, part: str, rows: Sequence[dict[str, Any]]) -> None:
        """The same for rows without a schema: a column exists if any row has it.

        A text column has the wrong type only if it holds no text in any row; single rows are refused when they are
        read.
        """
        errors = self._missing(part, {name: None for row in rows for name in row})
        wanted: list[tuple[str, str, tuple[type, ...], str]] = [
            (key, name, (str, list), TEXTS) for key, name in self._text_keys()
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
        keys = {**dict(self._text_keys()), "language_column": config.language_column}
        keys |= {"script_column": config.script_column, "group_column": config.group_column}
        if config.id_column != _OPTIONAL_ID or config.id_column in names:
            keys["id_column"] = config.id_column
        wanted: Sequence[tuple[str, str | None]] = [*keys.items(), *(("filter", name) for name in config.filter)]
        errors = []
        for key, name in wanted:
            if name is not None and name not in names:
                hint = " (null: documents are named by file and row)" if key == "id_column" else ""
                errors.append(f"source.{key}: {part} has no column {name!r}; its columns: {listed}{hint}")
            elif (count := list(names).count(name)) > 1:  # type: ignore[arg-type]
                errors.append(f"source.{key}: {part} has {count} columns {name!r}: rename all but one")
        return errors


@dataclass(kw_only=True, eq=False)
class RowsFile:
    """A file, or a dataset on disk, whose rows are documents: what the readers of all kinds have.

    place: path or URL; name: for messages and ids; size: bytes; characters: of its texts, approximately.
    """

    columns: Columns
    place: str
    name: str
    size: int = 0
    characters: int = 0
    rows: int = 0

    def index(self) -> dict[str, Any]:
        """The arguments of the constructor but the columns, as JSON."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.init and each.name != "columns"}

    def pieces(self, size: int) -> Iterator[int]:
        """Parts of `size` rows; a range may end after any row."""
        yield from (min(size, self.rows - start) for start in range(0, self.rows, size))


def _name(values: dict[str, Any] | ValueError, column: str | None) -> str | None:
    """The id or group in a column of a row; None if there is none, or the row cannot be read."""
    return None if column is None or isinstance(values, ValueError) else name_of(values.get(column))


def name_of(value: Any) -> str | None:
    """An id or a group as a string, None if it names nothing.

    Missing numbers make pandas' columns of integers floats: 7.0 is 7, and NaN is missing. An empty text names nothing.
    """
    if isinstance(value, float):
        return None if math.isnan(value) else str(int(value)) if value.is_integer() else str(value)
    return None if value is None or value == "" else str(value)


def _is_text(kind: Any) -> bool:
    """Whether a type of Arrow is that of texts or of lists of texts, plain or as categories."""
    import pyarrow.types as types

    if is_list(kind):
        kind = kind.value_type
    if types.is_dictionary(kind):  # what pandas and polars call categories
        kind = kind.value_type
    return any(
        is_kind(kind) for is_kind in (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    )


def is_list(kind: Any) -> bool:
    """Whether a type of Arrow is one of lists."""
    import pyarrow.types as types

    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return any(is_kind(kind) for is_kind in lists)


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
