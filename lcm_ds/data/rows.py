"""Rows: a piece of a shard → segments of its documents, and segments → a row of the batch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from lcm_ds.data.reader import Shard


class Segment(NamedTuple):
    """Concepts `start` to `stop` of a document, counted in the document."""

    shard: Shard
    document: int  # in the shard's own order
    start: int
    stop: int


class ShardInOrder(NamedTuple):
    """A shard with its documents in the order in which an epoch reads them."""

    shard: Shard
    documents: list[int]
    ends: list[int]  # concepts up to the end of documents[i], in that order

    @classmethod
    def of(cls, shard: Shard, order: np.ndarray) -> ShardInOrder:
        """`order`: int64 [documents], as lcm_ds.data.plan.document_order gives it."""
        return cls(shard, order.tolist(), np.cumsum(shard.lengths[order]).tolist())


def cut(read: ShardInOrder, start: int, stop: int, max_segment: int) -> Iterator[Segment]:
    """Segments of the concepts `start` to `stop` of a shard, counted in the order in which it is read.

    A document longer than max_segment is wrapped: cut at multiples of max_segment counted from its first concept,
    wherever rows begin and end.
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


def fill(
    segments: Iterable[Segment],
    concepts: np.ndarray,
    segment_ids: np.ndarray,
    number: int,
    origins: np.ndarray | None = None,
) -> int:
    """Copy segments one after another into a part of a row, which they fill; returns the number of the next segment.

    concepts: [n, embed_dim]; segment_ids: int32 [n], `number`, `number` + 1 … for the segments. origins: int64 [n, 2],
    where they are wanted: of each concept its document in the shard, and its position in that.
    """
    filled = 0
    for shard, document, start, stop in segments:
        until = filled + stop - start
        shard.read_into(concepts[filled:until], document, start)
        segment_ids[filled:until] = number
        if origins is not None:
            origins[filled:until, 0] = document
            origins[filled:until, 1] = np.arange(start, stop)
        filled, number = until, number + 1
    return number


def blank(concepts: np.ndarray, segment_ids: np.ndarray, origins: np.ndarray | None = None) -> None:
    """Make a part of a row one without concepts: zeros, and −1 for segment and origin."""
    concepts[:] = 0
    segment_ids[:] = -1
    if origins is not None:
        origins[:] = -1
