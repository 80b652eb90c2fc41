"""documents.idx: where each document's concepts lie in its tar, how many there are, and checksums of their bytes.

With it documents are read without parsing a tar's headers, and put in order without being read. A shard's record, in
little-endian uint64: of each document the offset of its first concept in the tar; of each the number of its concepts,
and in the upper 32 bits how many of them are given; of each the number of its first checksum; then the checksums, xxh3
of every CHUNK concepts of a document as they are stored. shards.jsonl says where a record begins, and its checksum.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, ClassVar, NamedTuple, Protocol

import numpy as np
from pydantic import ConfigDict, Field
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from lcm_ds.errors import InputError
from lcm_ds.files import OpenFile, sync

INDEX = "documents.idx"
CHUNK = 64  # concepts of a checksum: a part of a document is compared without reading all of a long one
WORD = 8  # bytes

Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class IndexEntry:
    """A shard's record."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    at: Count  # where it begins, in words
    checksums: Count  # how many it has
    xxh3: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]  # of the record

    def words(self, documents: int) -> int:
        """The length of the record of a shard with so many documents."""
        return 3 * documents + self.checksums

    @classmethod
    def of(cls, record: bytes, at: int, documents: int) -> IndexEntry:
        """The entry of a record that begins at word `at`."""
        return cls(at, len(record) // WORD - 3 * documents, xxh3_64_hexdigest(record))


class Listed(Protocol):
    """A shard, as shards.jsonl lists it."""

    @property
    def name(self) -> str:
        """Its file."""

    @property
    def documents(self) -> int:
        """How many it has."""

    @property
    def index(self) -> IndexEntry | None:
        """Its record."""


def make_record(
    concepts: Iterable[bytes], size: int, offsets: Sequence[int], lengths: np.ndarray, given: np.ndarray
) -> bytes:
    """The record of a shard.

    Args:
        concepts: of each document the stored bytes of its concepts.
        size: bytes of a concept.
        offsets: of each document, where they begin in the tar.
        lengths: int64, of each document the number of its concepts.
        given: int64, how many of them are given.

    Returns:
        The record.
    """
    checksums: list[int] = []
    firsts: list[int] = []
    for data in concepts:
        firsts.append(len(checksums))
        checksums += (xxh3_64_intdigest(data[at : at + CHUNK * size]) for at in range(0, len(data), CHUNK * size))
    counts = lengths.astype("<u8") | given.astype("<u8") << _UPPER
    parts = (np.array(offsets, "<u8"), counts, np.array(firsts, "<u8"), np.array(checksums, "<u8"))
    return b"".join(part.tobytes() for part in parts)


class IndexWriter(AbstractContextManager["IndexWriter"]):
    """Writes the index of a folder, record by record; without `commit` nothing is left of it."""

    def __init__(self, folder: Path) -> None:
        self._path, self._words = folder / INDEX, 0
        self._partial = folder / f"{INDEX}.partial"
        self._file = self._partial.open("wb")

    def add(self, record: bytes, documents: int) -> IndexEntry:
        """Write the record of a shard with so many documents."""
        entry = IndexEntry.of(record, self._words, documents)
        self._file.write(record)
        self._words += entry.words(documents)
        return entry

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._words * WORD

    def sync(self) -> None:
        """Sync the file."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def commit(self) -> None:
        """Sync the file, and give it its name."""
        self.sync()
        os.replace(self._partial, self._path)
        sync(self._path.parent)

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)


def read_record(file: BinaryIO, shard: Listed) -> bytes:
    """The record of a shard in an index. Raises InputError if it has changed."""
    assert shard.index is not None
    file.seek(shard.index.at * WORD)
    record = file.read(shard.index.words(shard.documents) * WORD)
    if xxh3_64_hexdigest(record) != shard.index.xxh3:
        raise InputError(f"{file.name}: its record of {shard.name} has changed: {_HINT}")
    return record


def has_records(path: Path, shards: Iterable[Listed]) -> bool:
    """Whether a file is an index with the records of all shards."""
    with path.open("rb") as file:
        try:
            return all(read_record(file, shard) is not None for shard in shards)
        except InputError:
            return False


class Places(NamedTuple):
    """Where documents lie, and the checksums of their bytes; int64 [n] each."""

    offsets: np.ndarray  # of the first concept, in bytes of the tar
    lengths: np.ndarray  # concepts
    given: np.ndarray  # how many of them are given
    checksums: np.ndarray  # the number of the first in DocumentIndex.words


class DocumentIndex:
    """The records of a dataset's shards, mapped into memory. Safe to use from several threads.

    words: uint64, all of the file; `Places.checksums` counts in it.
    """

    def __init__(self, file: OpenFile, shards: Sequence[Listed]) -> None:
        """Map the file.

        Args:
            file: documents.idx.
            shards: Those of the dataset, each with its entry in the index.

        Raises:
            InputError: The file is too short for them.
        """
        self._file, self._shards = file, shards
        entries = [shard.index for shard in shards if shard.index is not None]
        assert len(entries) == len(shards)
        end = max((e.at + e.words(shard.documents) for e, shard in zip(entries, shards, strict=True)), default=0)
        if len(file) < end * WORD:
            raise InputError(f"{file.path}: has {len(file)} bytes, not {end * WORD}: {_HINT}")
        self._map = mmap.mmap(file.descriptor, len(file) // WORD * WORD, prot=mmap.PROT_READ) if end else b""
        self.words = np.frombuffer(self._map, "<u8")
        self._at = np.array([entry.at for entry in entries], np.int64)
        self._documents = np.array([shard.documents for shard in shards], np.int64)
        self._checked = np.zeros(len(shards), bool)

    @property
    def path(self) -> Path:
        """Of the file."""
        return self._file.path

    def lengths(self, shard: int) -> np.ndarray:
        """uint32 [documents]: concepts of each document of a shard. Raises InputError if its record has changed."""
        return self._counts(shard)[::2]

    def given(self, shard: int) -> np.ndarray:
        """uint32 [documents]: how many of each document's concepts are given. Raises InputError likewise."""
        return self._counts(shard)[1::2]

    def places(self, shards: np.ndarray, documents: np.ndarray) -> Places:
        """Where documents lie, each given by its shard and its number in that: int64 [n] each.

        Raises InputError if a shard's record has changed.
        """
        for shard in np.unique(shards[~self._checked[shards]]).tolist():
            self._check(shard)
        at, counts = self._at[shards], self._documents[shards]
        words = self.words[at + counts + documents]
        firsts = self.words[at + 2 * counts + documents]
        return Places(
            self.words[at + documents].astype(np.int64),
            (words & _LOW).astype(np.int64),
            (words >> _UPPER).astype(np.int64),
            at + 3 * counts + firsts.astype(np.int64),
        )

    def _counts(self, shard: int) -> np.ndarray:
        if not self._checked[shard]:
            self._check(shard)
        begin = int(self._at[shard] + self._documents[shard])
        return self.words[begin : begin + int(self._documents[shard])].view("<u4")

    def _check(self, shard: int) -> None:
        """Compare the record of a shard with its checksum."""
        info = self._shards[shard]
        assert info.index is not None
        begin = info.index.at
        end = begin + info.index.words(info.documents)
        if xxh3_64_hexdigest(self.words[begin:end].data) != info.index.xxh3:
            raise InputError(f"{self.path}: its record of {info.name} has changed: {_HINT}")
        self._checked[shard] = True


_LOW, _UPPER = np.uint64(0xFFFFFFFF), np.uint64(32)
_HINT = "remove the file, and the next run makes it again"
