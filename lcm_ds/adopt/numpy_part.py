"""`.npy` and `.npz` files of concepts, with the sentences in a JSONL file beside them.

Two layouts: `NAME.npy` [all concepts, embed_dim] beside `NAME.jsonl`, whose lines are the documents in the order of
their concepts; and a folder with an array for each document, `ID.npy` or ID in an `.npz`, whose one JSONL file, if any,
has a line for each id.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from lcm_ds.adopt.columns import Block, missing_group
from lcm_ds.adopt.lists import Concepts, Sentences, sentence_problem
from lcm_ds.adopt.parts import BLOCK_BYTES
from lcm_ds.config import SourceConfig
from lcm_ds.errors import InputError, first_line
from lcm_ds.text.columns import name_of
from lcm_ds.text.files import check_size, stamp

_GROUP = 256  # documents
_SUFFIXES = (".npy", ".npz")


@dataclass(kw_only=True, eq=False)
class NumpyPart:
    """Either layout; see Part.

    place: an .npy file with its own JSONL, or a folder; field, id_field, group_column: the keys of sentences, id and
    group in a line of the JSONL; files: the ids of a folder's documents, with the file that each one's array is in.
    """

    together = supervised = False

    place: str
    name: str
    size: int
    split: str | None
    field: str
    id_field: str | None
    files: dict[str, str]
    group_column: str | None = None

    def __post_init__(self) -> None:
        path = Path(self.place)
        self._ids = list(self.files)
        self._jsonl = path.with_suffix(".jsonl") if path.is_file() else _only_jsonl(path)
        self._lines = np.zeros(1, np.int64)  # where lines begin in the JSONL
        self._line_of: dict[str, int] = {}  # by id, in a folder
        self._ends = np.zeros(1, np.int64)  # concepts before each document, if all are in one array
        self._stacked = path.is_file()
        self._inspect()
        self.groups = [min(_GROUP, self._rows - first) for first in range(0, self._rows, _GROUP)]
        self.itemsize, self.width = 4, self._width()

    @classmethod
    def inspect(cls, config: SourceConfig, place: str, name: str, split: str | None) -> NumpyPart:
        """The part; arguments and errors as of ParquetPart."""
        field = config.sentences_columns[0] if config.sentences_columns else "sentences"
        path = Path(place)
        files = {} if path.is_file() else _files(path)
        size = sum(file.stat().st_size for file in ([path] if path.is_file() else _arrays(path)))
        keys = {"id_field": config.id_column, "group_column": config.group_column}
        return cls(place=place, name=name, size=size, split=split, files=files, field=field, **keys)

    def read(self, group: int, first: int, last: int) -> Iterator[Block]:
        """As in Part."""
        begin = group * _GROUP
        if self._stacked:
            check_size(self.place, self.name, self.size)
            yield from self._from_stack(begin + first, begin + last)
        else:
            yield from self._from_files(begin + first, begin + last)

    def index(self) -> dict[str, Any]:
        """As in Part."""
        return asdict(self)

    def described(self) -> dict[str, Any] | None:
        """As in Part."""
        return None

    @property
    def _rows(self) -> int:
        return len(self._ends) - 1 if self._stacked else len(self._ids)

    def _inspect(self) -> None:
        """Read the JSONL once. Raises InputError if documents and arrays do not belong together."""
        if self._jsonl is None:
            if self.group_column is not None:
                raise InputError(missing_group(self.name, self.group_column, ()))
            return
        begins, counts, names, keys = [], [], [], dict[str, None]()
        with self._jsonl.open("rb") as file:
            begin = 0
            for number, line in enumerate(file, start=1):
                if line.strip(b"\xef\xbb\xbf \t\r\n"):
                    document = self._object(line, f"{self._jsonl}: line {number}")
                    begins.append(begin)
                    counts.append(len(document[self.field]))
                    names.append(None if self.id_field is None else document.get(self.id_field))
                    keys |= dict.fromkeys(document)
                begin += len(line)
        if begins and self.group_column is not None and self.group_column not in keys:
            raise InputError(missing_group(str(self._jsonl), self.group_column, keys))
        self._lines = np.array(begins, np.int64)
        if self._stacked:
            self._ends = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
            concepts = len(_load(self.place, self.name))
            if concepts != self._ends[-1]:
                raise InputError(f"{self.name}: has {concepts} concepts, {self._jsonl.name} {self._ends[-1]} sentences")
            return
        self._line_of = {str(name): line for line, name in enumerate(names)}
        known = set(self._ids)
        missing = [name for name in self._line_of if name not in known]
        more = [name for name in self._ids if name not in self._line_of]
        errors = [f"{self._jsonl}: {len(missing)} of its documents have no array: {missing[0]}"] if missing else []
        if more:
            errors.append(f"{self.name}: {len(more)} arrays have no line in {self._jsonl.name}: {more[0]}")
        if len(self._line_of) < len(names):
            errors.append(f"{self._jsonl}: {len(names) - len(self._line_of)} lines repeat an id or have none")
        if errors:
            raise InputError(errors)

    def _object(self, line: bytes, location: str) -> dict[str, Any]:
        try:
            document = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            raise InputError(f"{location}: not JSON: {first_line(error)}") from None
        if not isinstance(document, dict) or not isinstance(document.get(self.field), list):
            shown = line.decode("utf-8-sig").strip()
            raise InputError(f"{location}: {shown:.60}: has to be an object with a list of strings {self.field!r}")
        return document

    def _document(self, line: int) -> dict[str, Any]:
        assert self._jsonl is not None
        with self._jsonl.open("rb") as file:
            file.seek(int(self._lines[line]))
            return self._object(file.readline(), str(self._jsonl))

    def _from_stack(self, first: int, last: int) -> Iterator[Block]:
        """Blocks of documents whose concepts are rows of one array."""
        array = _load(self.place, self.name)
        most = max(1, BLOCK_BYTES // max(1, array.shape[1] * array.dtype.itemsize))
        while first < last:
            until = int(np.searchsorted(self._ends, self._ends[first] + most, side="right")) - 1
            until = min(last, max(first + 1, until))
            documents = [self._document(line) for line in range(first, until)]
            values = np.ascontiguousarray(array[self._ends[first] : self._ends[until]])
            offsets = self._ends[first : until + 1] - self._ends[first]
            ids = [None if self.id_field is None else document.get(self.id_field) for document in documents]
            lists = [document[self.field] for document in documents]
            names = [None if name is None else str(name) for name in ids]
            nothing: list[str | None] = [None] * len(names)
            groups = [self._group(document) for document in documents]
            yield Block(len(names), names, nothing, groups, [Concepts(values, offsets, {})], [_checked(lists)])
            first = until

    def _from_files(self, first: int, last: int) -> Iterator[Block]:
        """A block for each document."""
        for name in self._ids[first:last]:
            problems = {}
            values = np.empty((0, self.width or 1), np.float32)
            try:
                values = _as_concepts(self._array(name))
                if self.width is not None and values.shape[1] != self.width:
                    count, values = values.shape[1], values[:0]
                    problems[0] = f"concept 0 has {count} numbers, those of its dataset have {self.width}"
            except ValueError as error:
                problems[0] = first_line(error)
            concepts = Concepts(np.ascontiguousarray(values), np.array([0, len(values)]), problems)
            document = None if self._jsonl is None else self._document(self._line_of[name])
            texts = [] if document is None else [_checked([document[self.field]])]
            yield Block(1, [name], [None], [self._group(document or {})], [concepts], texts)

    def _group(self, document: dict[str, Any]) -> str | None:
        return None if self.group_column is None else name_of(document.get(self.group_column))

    def _array(self, name: str) -> np.ndarray:
        """The array of a document, as it is. Raises ValueError, and InputError if its file cannot be read."""
        path = Path(self.place) / self.files[name]
        try:
            return np.asarray(np.load(path, allow_pickle=False) if path.suffix == ".npy" else _archive(str(path))[name])
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {first_line(error)}") from None

    def _width(self) -> int | None:
        if self._stacked:
            return int(_load(self.place, self.name).shape[1])
        for name in self._ids:
            try:
                if len(concepts := _as_concepts(self._array(name))):
                    return int(concepts.shape[1])
            except ValueError:
                continue
        return None


def _checked(lists: list[list[Any]]) -> Sentences:
    """Sentences of JSONL, which may hold what is no string."""
    problems = {row: problem for row, each in enumerate(lists) if (problem := sentence_problem(each)) is not None}
    return Sentences([[] if row in problems else each for row, each in enumerate(lists)], problems)


def numpy_places(folder: Path) -> list[Path]:
    """The parts in a folder: each .npy file with its own JSONL, and the folder if it has other arrays."""
    arrays = _arrays(folder)
    own = [path for path in sorted(folder.glob("*.npy")) if path.with_suffix(".jsonl").is_file()]
    return [*own, *([folder] if arrays else [])]


def _arrays(folder: Path) -> list[Path]:
    """The arrays of a folder that have no JSONL of their own."""
    files = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    return [path for path in files if path.suffix == ".npz" or not path.with_suffix(".jsonl").is_file()]


def _files(folder: Path) -> dict[str, str]:
    """The ids of a folder's documents, in order, with the file that each one's array is in.

    Raises InputError if a file cannot be read, or two documents have the same id.
    """
    files: dict[str, str] = {}
    for path in _arrays(folder):
        try:
            names = [path.stem] if path.suffix == ".npy" else list(_archive(str(path)).files)
        except (ValueError, OSError, BadZipFile) as error:
            raise InputError(f"{path}: not an .npz file that can be read: {first_line(error)}") from None
        for name in names:
            if name in files:
                raise InputError(f"{folder}: {files[name]} and {path.name} both have an array {name}")
            files[name] = path.name
    return files


def _only_jsonl(folder: Path) -> Path | None:
    """The JSONL file of a folder that belongs to no single array. Raises InputError if there are several."""
    found = [path for path in sorted(folder.glob("*.jsonl")) if not path.with_suffix(".npy").is_file()]
    if len(found) > 1:
        raise InputError(f"{folder}: has several JSONL files ({', '.join(path.name for path in found)}): keep one")
    return found[0] if found else None


def _archive(path: str) -> Any:
    """An .npz file, kept open."""
    return _open_archive(path, stamp(path))


def _load(place: str, name: str) -> np.ndarray:
    """The array of all concepts, mapped into memory. Raises InputError."""
    return _map(place, name, stamp(place))


@lru_cache(maxsize=8)
def _open_archive(path: str, stamp: tuple[int, int] | None) -> Any:
    return np.load(path, allow_pickle=False)


@lru_cache(maxsize=4)
def _map(place: str, name: str, stamp: tuple[int, int] | None) -> np.ndarray:
    try:
        return _as_concepts(np.load(place, mmap_mode="r", allow_pickle=False))
    except (ValueError, OSError) as error:
        raise InputError(f"{name}: not an array of concepts: {first_line(error)}") from None


def _as_concepts(array: np.ndarray) -> np.ndarray:
    """An array [n, embed_dim]; one concept alone may be [embed_dim]. Raises ValueError."""
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or array.dtype.kind != "f":
        raise ValueError(f"is {array.dtype} {list(array.shape)}; concepts are floats [n, embed_dim]")
    return array
