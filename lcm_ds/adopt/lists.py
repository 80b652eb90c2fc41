"""Columns of lists in Arrow tables → concepts and sentences, row by row; what is irregular is told with its row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.types as types

from lcm_ds.text.columns import is_list

_Read = TypeVar("_Read")
CONCEPT_TYPES = "lists of lists of half, float or double"  # the types of a column of concepts, for messages
SENTENCE_TYPES = "lists of strings"


def use_system_allocator() -> None:
    """Have Arrow allocate from the C library in this process.

    Its own allocators keep what one thread allocates and another one frees: 100 MB, and more with time.
    """
    pa.set_memory_pool(pa.system_memory_pool())


class Concepts(NamedTuple):
    """The concepts of consecutive rows."""

    values: np.ndarray  # float [concepts, embed_dim], of all rows one after the other
    offsets: np.ndarray  # int64 [rows + 1]: where each row begins in them
    problems: dict[int, str]  # why a row, which then has no concepts, cannot be read


class Sentences(NamedTuple):
    """The sentences of consecutive rows."""

    lists: list[list[str]]
    problems: dict[int, str]


def holds_concepts(kind: Any) -> bool:
    """Whether a column of this type holds concepts: a list of lists of floats in each row."""
    kind = _plain(kind)
    return is_list(kind) and is_list(inner := _plain(kind.value_type)) and types.is_floating(inner.value_type)


def holds_sentences(kind: Any) -> bool:
    """Whether a column of this type holds a list of strings in each row."""
    return is_list(kind := _plain(kind)) and _is_string(kind.value_type)


def width_of(kind: Any) -> int | None:
    """Numbers in a concept, if the type of a column of concepts determines it."""
    inner = _plain(_plain(kind).value_type)
    return int(inner.list_size) if types.is_fixed_size_list(inner) else None


def itemsize_of(kind: Any) -> int:
    """Bytes of a number in a column of concepts of this type."""
    return int(_plain(_plain(kind).value_type).value_type.bit_width) // 8


def first_width(column: Any) -> int | None:
    """Numbers in the first concept of an Arrow array; None if it has none."""
    for row in _storage(column):
        for concept in row.values or () if row.is_valid else ():
            if concept.is_valid:
                return len(concept.values)
    return None


def read_concepts(column: Any, width: int) -> Concepts:
    """The concepts in an Arrow array of one of the types of `holds_concepts`.

    width: numbers in a concept; a row with others, with nulls or of another shape is a problem.
    """
    column = _storage(column)
    pieces, problems = _by_rows(column, lambda part: _concepts(part, width))
    if len(pieces) == 1 and (only := pieces[0]) is not None:
        return Concepts(*only, problems)
    counts = [0 if piece is None else len(piece[0]) for piece in pieces]
    values = [piece[0] for piece in pieces if piece is not None] or [np.empty((0, width), np.float32)]
    return Concepts(np.concatenate(values), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), problems)


def read_sentences(column: Any) -> Sentences:
    """The sentences in an Arrow array of one of the types of `holds_sentences`; a null is a list of none."""
    pieces, problems = _by_rows(column, _sentences)
    nothing: list[list[str]] = [[]]
    return Sentences([sentences for piece in pieces for sentences in piece or nothing], problems)


def _by_rows(column: Any, read: Callable[[Any], _Read]) -> tuple[list[_Read | None], dict[int, str]]:
    """All rows read at once; if that fails, each alone, and why some of them cannot be read."""
    if not column.null_count:
        try:
            return [read(column)], {}
        except ValueError:
            pass
    pieces: list[_Read | None] = []
    problems = {}
    for row in range(len(column)):
        part = column.slice(row, 1)
        try:
            pieces.append(read(part) if part.is_valid()[0].as_py() else None)
        except ValueError as error:
            pieces.append(None)
            problems[row] = str(error)
    return pieces, problems


def _concepts(column: Any, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and offsets as in Concepts. Raises ValueError naming the first concept that is irregular."""
    inner, offsets = _flat(column)
    inner = _storage(inner)
    if inner.null_count:
        raise ValueError(f"concept {_first_null(inner)} is null")
    numbers, ends = _flat(inner)
    lengths = np.diff(ends)
    if (wrong := np.flatnonzero(lengths != width)).size:
        raise ValueError(f"concept {wrong[0]} has {lengths[wrong[0]]} numbers, those of its dataset have {width}")
    if numbers.null_count:
        at = _first_null(numbers)
        raise ValueError(f"number {at % width} of concept {at // width} is null")
    return numbers.to_numpy(zero_copy_only=True).reshape(-1, width), offsets


def _sentences(column: Any) -> list[list[str]]:
    """Raises ValueError naming the first null; UnicodeDecodeError is one."""
    lists: list[list[str]] = column.to_pylist()
    for sentences in lists:
        if (problem := sentence_problem(sentences)) is not None:
            raise ValueError(problem)
    return lists


def sentence_problem(sentences: list[Any]) -> str | None:
    """The first item of a list that is no string; None if all are."""
    for at, sentence in enumerate(sentences):
        if not isinstance(sentence, str):
            return f"sentence {at} is {'null' if sentence is None else f'{sentence!r:.60}'}"
    return None


def _flat(column: Any) -> tuple[Any, np.ndarray]:
    """The values of lists one after the other, and where each list begins in them: int64 [lists + 1]."""
    if types.is_fixed_size_list(column.type):
        size = column.type.list_size
        values = column.values.slice(column.offset * size, len(column) * size)
        return values, np.arange(len(column) + 1, dtype=np.int64) * size
    if _is_view(column.type):  # whose lists may lie in any order; pyarrow 26.0.1 casts them to others
        return column.flatten(), np.concatenate([[0], np.cumsum(column.sizes.to_numpy(), dtype=np.int64)])
    offsets = column.offsets.to_numpy(zero_copy_only=True).astype(np.int64)
    return column.values.slice(offsets[0], offsets[-1] - offsets[0]), offsets - offsets[0]


def _first_null(column: Any) -> int:
    return int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))


def _storage(column: Any) -> Any:
    """An array of an extension type, as Array2D of datasets is, as plain lists."""
    return column.storage if isinstance(column, pa.ExtensionArray) else column


def _plain(kind: Any) -> Any:
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _is_view(kind: Any) -> bool:
    return bool(types.is_list_view(kind) or types.is_large_list_view(kind))


def _is_string(kind: Any) -> bool:
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))
