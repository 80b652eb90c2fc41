"""Which columns of a table hold the concepts, the sentences and the ids, and the rows of its batches as documents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lcm_ds.adopt.lists import (
    CONCEPT_TYPES,
    SENTENCE_TYPES,
    Concepts,
    Sentences,
    holds_concepts,
    holds_sentences,
    read_concepts,
    read_sentences,
)
from lcm_ds.config import SourceConfig
from lcm_ds.errors import InputError
from lcm_ds.text.columns import name_of

METADATA = b"lcm_ds"  # the key in the metadata of a file that export-data wrote; its value is JSON
GROUP = "group"  # the column of groups in such a file
EMBEDDING_SUFFIX = "_sonar_emb"  # in Meta's columns: of the concepts of the sentences in the column without it


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are read; of supervised documents concepts and sentences have two."""

    concepts: list[str]
    sentences: list[str]  # none, or as many
    id: str | None = None
    source: str | None = None  # of files that export-data wrote: `source` of each document
    group: str | None = None

    @property
    def names(self) -> list[str]:
        """All of them."""
        others = dict.fromkeys(name for name in (self.id, self.source, self.group) if name is not None)
        return [*self.concepts, *self.sentences, *others]

    @classmethod
    def of(cls, config: SourceConfig, part: str, schema: Any) -> Columns:
        """Those that the config names, or else that the types in an Arrow schema show.

        Args:
            config: The block `source`.
            part: The file, for messages.
            schema: Of the file.

        Returns:
            The columns.

        Raises:
            InputError: With a line for each column that is missing or of another type, or if types leave a choice.
        """
        fields = {field.name: field.type for field in schema}
        errors: list[str] = []
        concepts, sentences = config.concepts_columns, config.sentences_columns
        if not concepts:
            concepts = [name for name, kind in fields.items() if holds_concepts(kind)]
            if not concepts:
                shown = ", ".join(f"{name} ({kind})" for name, kind in fields.items())
                raise InputError(f"{part}: has no column of concepts ({CONCEPT_TYPES}); its columns: {shown}")
            if len(concepts) != (2 if (described(schema) or {}).get("supervised") else 1):
                raise InputError(
                    f"{part}: has several columns of concepts ({', '.join(concepts)}): name one in "
                    "source.concepts_columns (--concepts), or of supervised documents source and target"
                )
        if not sentences:
            sentences = _sentences_of(concepts, fields, part)
        for key, names, fits, meant in (
            ("concepts_columns", concepts, holds_concepts, CONCEPT_TYPES),
            ("sentences_columns", sentences, holds_sentences, SENTENCE_TYPES),
        ):
            for name in names:
                if name not in fields:
                    errors.append(f"source.{key}: {part} has no column {name!r}; its columns: {', '.join(fields)}")
                elif not fits(fields[name]):
                    errors.append(f"source.{key}: {name!r} of {part} holds {fields[name]}, not {meant}")
        id_column = config.id_column
        if id_column is not None and id_column not in fields:
            if id_column != SourceConfig.model_fields["id_column"].default:
                errors.append(f"source.id_column: {part} has no column {id_column!r}; its columns: {', '.join(fields)}")
            id_column = None
        ours = METADATA in (schema.metadata or {}) and "source" in fields
        group_column = config.group_column or (GROUP if ours and GROUP in fields else None)
        if group_column is not None and group_column not in fields:
            errors.append(missing_group(part, group_column, fields))
        used = [
            name
            for name in dict.fromkeys((*concepts, *sentences, id_column, group_column))
            if name is not None and schema.names.count(name) > 1
        ]
        errors += [f"{part}: has several columns {name!r}: rename all but one" for name in used]
        if errors:
            raise InputError(errors)
        return cls(list(concepts), list(sentences), id_column, "source" if ours else None, group_column)


def missing_group(part: str, column: str, names: Iterable[str]) -> str:
    """The line about a group column that is not there; names: of the columns that are."""
    return f"source.group_column: {part} has no column {column!r}; its columns: {', '.join(names)}"


def _sentences_of(concepts: Sequence[str], fields: dict[str, Any], part: str) -> list[str]:
    """The columns of the sentences of these concepts: named as in Meta's, or the only one; none if there is none."""
    found = [name.removesuffix(EMBEDDING_SUFFIX) for name in concepts]
    if all(name in fields and holds_sentences(fields[name]) for name in found):
        return found
    found = [name for name, kind in fields.items() if holds_sentences(kind)]
    if len(found) in (0, len(concepts)) and len(concepts) == 1:
        return found
    if not found:
        return []
    raise InputError(
        f"{part}: has several columns of sentences ({', '.join(found)}): name those of {', '.join(concepts)} in "
        "source.sentences_columns (--sentences), in the same order"
    )


def described(schema: Any) -> dict[str, Any] | None:
    """What export-data has written about a dataset into the metadata of a file; None for other files."""
    text = (schema.metadata or {}).get(METADATA)
    return None if text is None else dict(json.loads(text))


class Block(NamedTuple):
    """A few consecutive rows of a part."""

    rows: int
    ids: list[str | None]
    sources: list[str | None]
    groups: list[str | None]
    concepts: list[Concepts]  # of each column
    sentences: list[Sentences]

    def problem(self, row: int) -> str | None:
        """Why a row cannot be read, None if it can."""
        for problems in (column.problems for columns in (self.concepts, self.sentences) for column in columns):
            if row in problems:
                return problems[row]
        for concepts, sentences in zip(self.concepts, self.sentences, strict=bool(self.sentences)):
            count, length = len(sentences.lists[row]), int(concepts.offsets[row + 1] - concepts.offsets[row])
            if count != length:
                return f"has {count} sentences and {length} concepts"
        return None


def block_of(batch: Any, columns: Columns, width: int) -> Block:
    """The rows of an Arrow batch.

    Args:
        batch: With the columns.
        columns: Their names.
        width: Numbers in a concept.

    Returns:
        The rows; those that cannot be read have problems.
    """
    empty: list[str | None] = [None] * batch.num_rows
    return Block(
        batch.num_rows,
        empty if columns.id is None else _texts(batch.column(columns.id)),
        empty if columns.source is None else _texts(batch.column(columns.source)),
        empty if columns.group is None else [name_of(value) for value in batch.column(columns.group).to_pylist()],
        [read_concepts(batch.column(name), width) for name in columns.concepts],
        [read_sentences(batch.column(name)) for name in columns.sentences],
    )


def _texts(column: Any) -> list[str | None]:
    return [None if value is None else str(value) for value in column.to_pylist()]


def checked(concepts: Concepts, bad: np.ndarray) -> Concepts:
    """The concepts, with a problem for each row that holds one that is not finite, bool [concepts]."""
    problems = dict(concepts.problems)
    rows = np.searchsorted(concepts.offsets, np.flatnonzero(bad), side="right") - 1
    for row, at in zip(rows.tolist(), np.flatnonzero(bad).tolist(), strict=True):
        problems.setdefault(row, _not_finite(concepts.values[at], at - int(concepts.offsets[row])))
    return concepts._replace(problems=problems)


def _not_finite(concept: np.ndarray, at: int) -> str:
    value = concept[~np.isfinite(concept)]
    if value.size:
        return f"concept {at} is not finite: {value[0]}"
    largest = concept[np.abs(concept).argmax()]
    return f"concept {at} is too large to be stored: {largest:.6g}"


def rows_between(batches: Iterator[Any], first: int, last: int) -> Iterator[Any]:
    """Rows `first` up to, not including, `last` of consecutive Arrow batches, in the batches that hold them."""
    row = 0
    for batch in batches:
        if row >= last:
            return
        if row + batch.num_rows > first:
            begin = max(0, first - row)
            yield batch.slice(begin, min(batch.num_rows, last - row) - begin)
        row += batch.num_rows
