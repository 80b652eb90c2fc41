"""Rows: the segments of a plan, read from their shards into the rows of a batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest

from lcm_ds.data.format import Dataset
from lcm_ds.data.index.records import CHUNK, INDEX, Places
from lcm_ds.data.open_shards import OpenShards
from lcm_ds.data.plan import Segments
from lcm_ds.data.shard import open_shard, stored_dtype
from lcm_ds.errors import InputError
from lcm_ds.files import OpenFile


class Rows(NamedTuple):
    """The rows of a batch that is being filled; arrays that are not needed are None."""

    concepts: np.ndarray  # [rows, row_length, embed_dim]
    segment_ids: np.ndarray  # int32 [rows, row_length]
    given: np.ndarray | None  # bool [rows, row_length]: concepts that are no targets although others precede them
    origins: np.ndarray | None  # int64 [rows, row_length, 2]: the concept's document, and its position in that


def fill_rows(segments: Segments, rows: Rows, shards: OpenShards, before: Sequence[np.ndarray]) -> int:
    """Read segments into their rows; the rest of each row becomes padding: zeros, and −1 for segment and origin.

    The segments of a row get the ids 0, 1, 2 …. Of a supervised document the source is given, and so are all segments
    but the first, which have lost their source. In place of a segment that cannot be read is padding.

    Args:
        segments: In the order of rows.
        rows: Where to.
        shards: Where from.
        before: For each dataset, the documents before each of its shards.

    Returns:
        How many concepts could not be read.

    Raises:
        InputError: A segment cannot be read and is not skipped (see `OpenShards.skip`).
    """
    length = rows.segment_ids.shape[1]
    columns = np.bincount(segments.row, segments.stop - segments.start, len(rows.segment_ids)).astype(np.int64)
    for row in np.flatnonzero(columns < length).tolist():
        rows.concepts[row, columns[row] :] = 0
    flat = rows.concepts.reshape(-1, rows.concepts.shape[-1])
    begins = segments.row * length + segments.column
    read = np.ones(len(begins), bool)
    supervised = np.zeros(len(begins), np.int64)  # concepts of the source
    for source in np.unique(segments.source).tolist():
        chosen = np.flatnonzero(segments.source == source)
        own = Segments(*(array[chosen] for array in segments))
        dataset = shards.datasets[source]
        assert dataset.index is not None
        places = dataset.index.places(own.shard, own.document)
        if dataset.info.supervised is not None:
            supervised[chosen] = np.where(own.start == 0, places.given, own.stop)
        read[chosen] = _read(shards, source, own, places, begins[chosen], flat)

    rows.segment_ids[:] = -1
    if rows.given is not None:
        rows.given[:] = False
    if rows.origins is not None:
        rows.origins[:] = -1
    lengths = segments.stop - segments.start
    missing = int(lengths[~read].sum())
    if missing:
        segments = Segments(*(array[read] for array in segments))
        begins, lengths, supervised = begins[read], lengths[read], supervised[read]
    total = np.arange(int(lengths.sum()))
    inside = total - np.repeat(np.cumsum(lengths) - lengths, lengths)  # of a concept in its segment
    at = inside + np.repeat(begins, lengths)
    first = np.searchsorted(segments.row, segments.row)  # segment of each one's row
    rows.segment_ids.reshape(-1)[at] = np.repeat(np.arange(len(begins)) - first, lengths)
    positions = inside + np.repeat(segments.start, lengths)
    if rows.given is not None:
        rows.given.reshape(-1)[at] = positions < np.repeat(supervised, lengths)
    if rows.origins is not None:
        number = [before[source][shard] for source, shard in zip(segments.source, segments.shard, strict=True)]
        origins = rows.origins.reshape(-1, 2)
        origins[at, 0] = np.repeat(np.array(number, np.int64) + segments.document, lengths)
        origins[at, 1] = positions
    return missing


def _read(
    shards: OpenShards, source: int, segments: Segments, places: Places, begins: np.ndarray, flat: np.ndarray
) -> np.ndarray:
    """Read segments of one dataset into `flat` [concepts, embed_dim], at `begins`; bool [segments]: those that were."""
    dataset = shards.datasets[source]
    reader = _Reader(dataset, flat, partial(shards.file, source))
    read = np.ones(len(begins), bool)
    pieces = reader.pieces(segments, places, begins)
    for at, piece in enumerate(pieces):
        try:
            problem = reader.read(piece, pieces[at + 1 :])
            if problem and shards.changed(source, piece.shard, reader.file_of(piece)):
                reader.close_file()
                problem = reader.read(piece)
            if problem:
                raise InputError(f"{dataset.location(piece.shard)}: {_name(dataset, piece)}: {problem}")
        except InputError as error:
            shards.skip(source, piece.shard, error)
            flat[piece.begin : piece.begin + piece.stop - piece.start] = 0
            read[piece.segment] = False
    return read


class _Piece(NamedTuple):
    """A segment and the bytes that are read for it: those of its concepts, rounded to what has a checksum."""

    segment: int  # its number
    shard: int
    document: int
    start: int  # its first concept, counted in the document
    stop: int
    begin: int  # of its first concept in the batch
    first: int  # the first concept that is read
    offset: int  # of that in the file
    size: int  # bytes
    checksums: list[int]  # of each CHUNK concepts that are read
    memory: memoryview | None  # where to, if they are the bytes of the batch


class _Reader:
    """Reads documents of a dataset into `flat` [concepts, embed_dim], raw space, in its dtype.

    What the kernel has not in memory it is asked for in one go: a disk or a server is faster with many requests.
    """

    def __init__(self, dataset: Dataset, flat: np.ndarray, file_of: Callable[[int], OpenFile]) -> None:
        assert dataset.index is not None
        self._flat, self._storage, self._open_file = flat, dataset.storage, file_of
        self._dtype = stored_dtype(dataset.info.dtype)
        self._size = dataset.embed_dim * self._dtype.itemsize  # bytes of a concept
        self._words = dataset.index.words if dataset.checksums else None
        same = self._storage is None and flat.dtype == self._dtype
        self._memory = flat.reshape(-1).view(np.uint8).data if same else None
        self._cached = True
        self._shard = -1
        self._file: OpenFile | None = None

    def pieces(self, segments: Segments, places: Places, begins: np.ndarray) -> list[_Piece]:
        """What has to be read for segments, shard by shard and in the order of their bytes.

        Args:
            segments: Of this dataset.
            places: Of their documents.
            begins: int64 [segments], where in `flat` each one's first concept goes.
        """
        order = np.lexsort((places.offsets, segments.shard))
        shard, document, start, stop, begin = (
            array[order] for array in (segments.shard, segments.document, segments.start, segments.stop, begins)
        )
        first, last, size = start, stop, self._size
        checksums: list[list[int]] = [[]] * len(order)
        if self._words is not None:
            first, last = start - start % CHUNK, np.minimum(places.lengths[order], -(-stop // CHUNK) * CHUNK)
            counts = -(-(last - first) // CHUNK)
            ends = np.cumsum(counts)
            numbers = places.checksums[order] + first // CHUNK - (ends - counts)
            words = self._words[np.repeat(numbers, counts) + np.arange(len(numbers) and ends[-1])].tolist()
            bounds = [0, *ends.tolist()]
            checksums = [words[a:b] for a, b in pairwise(bounds)]
        memory: list[memoryview | None] = [None] * len(order)
        if self._memory is not None:
            whole = ((first == start) & (last == stop)).tolist()
            places_in = zip((begin * size).tolist(), ((begin + stop - start) * size).tolist(), whole, strict=True)
            memory = [self._memory[a:b] if same else None for a, b, same in places_in]
        offset = places.offsets[order] + first * size
        columns = (order, shard, document, start, stop, begin, first, offset, (last - first) * size)
        return list(map(_Piece._make, zip(*(column.tolist() for column in columns), checksums, memory, strict=True)))

    def read(self, piece: _Piece, later: Sequence[_Piece] = ()) -> str | None:
        """Read a piece and compare it with its checksums.

        Args:
            piece: What to read.
            later: Those that are read after it.

        Returns:
            What is wrong with what was read, or None.

        Raises:
            InputError: The file cannot be read.
        """
        file, read = self.file_of(piece), piece.memory
        if read is None:
            read = _scratch(piece.size)
        try:
            complete = self._cached and file.read_cached(read, piece.offset)
            if not complete:
                self._fetch(later)
                complete = file.read_into(read, piece.offset)
        except OSError as error:
            raise InputError(f"{file.path}: cannot be read: {error.strerror}") from None
        if not complete:
            return "is cut off: the file has become shorter"
        size = CHUNK * self._size
        for at, checksum in enumerate(piece.checksums):
            if xxh3_64_intdigest(read[at * size : (at + 1) * size]) != checksum:
                return f"has another checksum than {INDEX} lists: its bytes have changed"
        if piece.memory is None:
            concepts = np.frombuffer(read, self._dtype).reshape(-1, self._flat.shape[1])
            concepts = concepts[piece.start - piece.first : piece.stop - piece.first]
            out = self._flat[piece.begin : piece.begin + len(concepts)]
            if self._storage is None:
                out[...] = concepts
            else:
                self._storage.decode(concepts, out)
        return None

    def file_of(self, piece: _Piece) -> OpenFile:
        """The file of a piece; raises InputError if it cannot be opened."""
        if piece.shard != self._shard or self._file is None:
            self.close_file()
            self._file, self._shard = self._open_file(piece.shard), piece.shard
        return self._file

    def close_file(self) -> None:
        """Ask for the file of the next piece, even if it is of the same shard."""
        self._file = None

    def _fetch(self, pieces: Sequence[_Piece]) -> None:
        """Have the kernel fetch pieces, if it was not asked yet."""
        if self._cached:
            self._cached = False
            for piece in pieces:
                with suppress(InputError):  # comes again when it is read
                    self._open_file(piece.shard).fetch(piece.offset, piece.size)


_THREAD = threading.local()


def _scratch(size: int) -> memoryview:
    """Memory of this thread, uninitialised: fresh memory costs a page fault every 4 KiB."""
    if len(memory := getattr(_THREAD, "memory", b"")) < size:
        memory = _THREAD.memory = bytearray(size)
    return memoryview(memory)[:size]


def _name(dataset: Dataset, piece: _Piece) -> str:
    """For messages: the key of a document, if its tar can still be read."""
    with suppress(InputError):
        return open_shard(replace(dataset, checksums=False), piece.shard).keys[piece.document]
    return f"document {piece.document}"
