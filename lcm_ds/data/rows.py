"""Rows: the segments of a plan, read from their shards into the rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
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
    reader = _Reader(dataset, flat)
    read = np.ones(len(begins), bool)
    # Shard by shard, in the order of their bytes.
    order = np.lexsort((places.offsets, segments.shard)).tolist()
    columns = (segments.shard, segments.document, segments.start, segments.stop, begins, *places)
    lists = [array.tolist() for array in columns]
    current, file = -1, None
    for i in order:
        shard, document, start, stop, begin, offset, length, _, checksums = (column[i] for column in lists)
        try:
            if shard != current or file is None:
                current, file = shard, shards.file(source, shard)
            problem = reader.read(file, start, stop, begin, offset, length, checksums)
            if problem and shards.changed(source, shard):
                file = shards.file(source, shard)
                problem = reader.read(file, start, stop, begin, offset, length, checksums)
            if problem:
                raise InputError(f"{dataset.location(shard)}: {_name(dataset, shard, document)}: {problem}")
        except InputError as error:
            file = None
            shards.skip(source, shard, error)
            flat[begin : begin + stop - start] = 0
            read[i] = False
    return read


class _Reader:
    """Reads documents of a dataset into `flat` [concepts, embed_dim], raw space, in its dtype."""

    def __init__(self, dataset: Dataset, flat: np.ndarray) -> None:
        assert dataset.index is not None
        self._flat, self._storage = flat, dataset.storage
        self._dtype = stored_dtype(dataset.info.dtype)
        self._size = dataset.embed_dim * self._dtype.itemsize  # bytes of a concept
        self._words = dataset.index.words if dataset.checksums else None
        same = self._storage is None and flat.dtype == self._dtype
        self._memory = flat.reshape(-1).view(np.uint8).data if same else None

    def read(
        self, file: OpenFile, start: int, stop: int, begin: int, offset: int, length: int, checksums: int
    ) -> str | None:
        """Read concepts `start` to `stop` of a document into flat[begin:], and compare them with their checksums.

        Args:
            file: The shard's.
            start: The first concept, counted in the document.
            stop: The last one plus 1.
            begin: Where to.
            offset: Of the document's first concept, in bytes of the file.
            length: Concepts of the document.
            checksums: The number of its first checksum in the index.

        Returns:
            What is wrong with what was read, or None.

        Raises:
            InputError: The file cannot be read.
        """
        first, last = start, stop
        if self._words is not None:  # checksums are of CHUNK concepts
            first, last = start - start % CHUNK, min(length, -(-stop // CHUNK) * CHUNK)
        size = self._size
        direct = self._memory is not None and first == start and last == stop
        if direct:
            assert self._memory is not None
            read = self._memory[begin * size : (begin + stop - start) * size]
        else:
            read = memoryview(bytearray((last - first) * size))
        try:
            complete = file.read_into(read, offset + first * size)
        except OSError as error:
            raise InputError(f"{file.path}: cannot be read: {error.strerror}") from None
        if not complete:
            return "is cut off: the file has become shorter"
        if self._words is not None:
            for at in range(first, last, CHUNK):
                part = read[(at - first) * size : (at - first + CHUNK) * size]
                if xxh3_64_intdigest(part) != self._words[checksums + at // CHUNK]:
                    return f"has another checksum than {INDEX} lists: its bytes have changed"
        if not direct:
            concepts = np.frombuffer(read, self._dtype).reshape(last - first, -1)[start - first : stop - first]
            out = self._flat[begin : begin + stop - start]
            if self._storage is None:
                out[...] = concepts
            else:
                self._storage.decode(concepts, out)
        return None


def _name(dataset: Dataset, shard: int, document: int) -> str:
    """For messages: the key of a document, if its tar can still be read."""
    with suppress(InputError):
        return open_shard(replace(dataset, checksums=False), shard).keys[document]
    return f"document {document}"
