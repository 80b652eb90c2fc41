"""Rows: a piece of a shard → segments of its documents, and segments → a row of the batch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from lcm_ds.data.shard import Shard


class Segment(NamedTuple):
    """Concepts `start` to `stop` of a document, counted in the document."""

    shard: Shard
    document: int  # in the shard's own order
    start: int
    stop: int


class ShuffledShard(NamedTuple):
    """A shard with its documents in the order in which an epoch reads them."""

    shard: Shard
    documents: list[int]
    ends: list[int]  # concepts up to the end of documents[i], in that order

    @classmethod
    def of(cls, shard: Shard, order: np.ndarray) -> ShuffledShard:
        """`order`: int64 [documents], as lcm_ds.data.plan.document_order gives it."""
        return cls(shard, order.tolist(), np.cumsum(shard.lengths[order]).tolist())


def iter_segments(read: ShuffledShard, start: int, stop: int, max_segment: int) -> Iterator[Segment]:
    """The segments of concepts `start` to `stop` of a shard, counted in the order of the epoch.

    A document longer than max_segment is wrapped: cut at multiples of max_segment counted from its first concept,
    independent of where rows begin and end.
    """
    shard, documents, ends = read
    at = bisect_right(ends, start)
    first = ends[at - 1] if at else 0
    while start < stop:
        end = ends[at] if ends[at] < stop else stop
        while start < end:
            offset = start - first
            until = (offset // max_segment + 1) * max_segment
            if until > end - first:
                until = end - first
            yield Segment(shard, documents[at], offset, until)
            start = first + until
        first = ends[at]
        at += 1


class Row(NamedTuple):
    """A row, or a part of one, of a batch that is being filled; arrays that are not needed are None."""

    concepts: np.ndarray  # [n, embed_dim]
    segment_ids: np.ndarray  # int32 [n]
    given: np.ndarray | None  # bool [n]: concepts that are no targets although others precede them in their segment
    origins: np.ndarray | None  # int64 [n, 2]: the concept's document, and its position in that

    def part(self, part: int | slice) -> Row:
        """Some of its concepts, or one row of arrays that have several."""
        return Row(*(None if array is None else array[part] for array in self))  # type: ignore[arg-type]


def copy_segments(segments: Iterable[Segment], row: Row, index: int) -> int:
    """Copy segments one after another into a part of a row, which they fill; returns the index of the next segment.

    The segments get the ids `index`, `index` + 1 …; documents are counted in their shard. Of a supervised document the
    source is given, and so are all segments but the first, which have lost their source.
    """
    filled = 0
    for shard, document, start, stop in segments:
        until = filled + stop - start
        shard.read_into(row.concepts[filled:until], document, start)
        row.segment_ids[filled:until] = index
        if row.given is not None:
            source = int(shard.given[document]) if start == 0 or not shard.supervised else stop
            row.given[filled:until] = np.arange(start, stop) < source
        if row.origins is not None:
            row.origins[filled:until, 0] = document
            row.origins[filled:until, 1] = np.arange(start, stop)
        filled, index = until, index + 1
    return index


def clear(row: Row) -> None:
    """Make a part of a row padding: zeros, and −1 for segment and origin."""
    row.concepts[:] = 0
    row.segment_ids[:] = -1
    if row.given is not None:
        row.given[:] = False
    if row.origins is not None:
        row.origins[:] = -1
