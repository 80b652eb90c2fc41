"""The plan: which concepts step s, lane j holds, as a pure function of the shards' sizes, a seed and the batch.

Nothing is replayed to find a step: a lane is a list of shards with prefix sums, extended an epoch at a time, and a row
is a range of its concepts. The ends of rows do not cut supervised documents: the plan knows the lengths of their
documents, and a shard fills complete rows. The plan does no I/O and knows neither world size nor micro-batch.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np

from lcm_ds.errors import InputError

# Part of every fingerprint, to be raised when the order changes; the second is for orders with a supervised dataset.
ORDER, SUPERVISED_ORDER = 1, 2
# Shards whose rows are cached, besides two per lane.
ROWS_KEPT = 256


@dataclass(frozen=True)
class Source:
    """One dataset of a mixture, as the plan sees it."""

    concepts: Sequence[int]  # of each shard, in order of the shards' names
    weight: float = 1.0  # share of the lanes
    # of a supervised dataset: concepts of each document of each shard; and of a segment, at most
    lengths: Sequence[Sequence[int]] | None = None
    longest: int | None = None


class Piece(NamedTuple):
    """Concepts `start` to `stop` of a shard, counted through its documents in the order they have in that epoch."""

    source: int
    epoch: int
    shard: int
    start: int
    stop: int


class Epoch(NamedTuple):
    """The shards of an epoch of one source; lane j has those from bounds[j] to bounds[j + 1]."""

    shards: np.ndarray  # int32 [shards], lane by lane, in the order of assignment
    # the end of each shard in its lane, counted from the first epoch on; a view of int64 [shards], which bisect reads
    # several times as fast as the array
    ends: memoryview
    bounds: list[int]  # [lanes + 1]


class Plan:
    """The order of data of a run.

    Safe to use from several threads.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        rows_per_step: int,
        row_length: int,
        epochs: int | None = None,
    ) -> None:
        """Assign the lanes to the sources.

        Args:
            sources: The datasets.
            seed: Of the permutations.
            rows_per_step: Lanes, allocated to the sources by weight (largest remainder).
            row_length: Concepts of a row.
            epochs: How often each source is read; None for endless.

        Raises:
            InputError: A source has no concepts, or its weight gives it no lane.
        """
        self.seed, self.rows_per_step, self.row_length, self.epochs = seed, rows_per_step, row_length, epochs
        self.lanes_per_source = allocate_lanes([source.weight for source in sources], rows_per_step)
        self._streams = [
            _Stream(index, source, lanes, seed, epochs, row_length)
            for index, (source, lanes) in enumerate(zip(sources, self.lanes_per_source, strict=True))
        ]
        self._stream_of_lane = [(s, lane) for s, lanes in enumerate(self.lanes_per_source) for lane in range(lanes)]

    def pieces(self, step: int, lane: int) -> list[Piece]:
        """The row of `lane` (0 to rows_per_step − 1) in `step` (from 0), in order.

        Together row_length concepts; fewer if the lane ends in this row, none after that. Of a supervised source, one
        piece of complete segments; fewer concepts if the next segment would not have fitted.
        """
        source, own = self._stream_of_lane[lane]
        return self._streams[source].pieces(own, step * self.row_length, (step + 1) * self.row_length)

    def source_of(self, lane: int) -> int:
        """The index of the source that a lane reads."""
        return self._stream_of_lane[lane][0]

    def upcoming_shards(self, step: int, lane: int, count: int) -> list[int]:
        """The next `count` shards of its source, or fewer, that `lane` reads from the beginning of `step` on."""
        source, own = self._stream_of_lane[lane]
        return self._streams[source].upcoming_shards(own, step * self.row_length, count)

    @cached_property
    def steps(self) -> int | None:
        """Steps until the last lane ends; None if epochs are unlimited."""
        if self.epochs is None:
            return None
        return max(-(-stream.longest_lane() // self.row_length) for stream in self._streams)

    def concepts(self, step: int) -> int:
        """Concepts in the rows before `step`: a lane that has ended adds none."""
        return sum(stream.concepts_up_to(step * self.row_length) for stream in self._streams)

    def epoch(self, step: int) -> float:
        """Concepts in the rows before `step`, divided by all concepts."""
        return self.concepts(step) / sum(stream.total for stream in self._streams)

    def packs(self, source: int) -> bool:
        """Whether rows of a source hold complete segments, as for a supervised dataset."""
        return self._streams[source].packs

    @cached_property
    def row_slots(self) -> int:
        """Concepts that the rows of the first epoch have room for, padding included."""
        return sum(int(stream.sizes(0).sum()) for stream in self._streams)


def allocate_lanes(weights: Sequence[float], lanes: int) -> list[int]:
    """`lanes` allocated in proportion to `weights`, by largest remainder (the first of equals).

    Raises InputError if a weight is too small for a lane.
    """
    total = sum(Fraction(weight) for weight in weights)
    shares = [Fraction(weight) * lanes / total for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda source: counts[source] - shares[source])
    for source in by_remainder[: lanes - sum(counts)]:
        counts[source] += 1
    if 0 in counts:
        raise InputError(
            f"weights {list(weights)} share {lanes} lanes as {counts}: dataset {counts.index(0)} would never be read; "
            "raise its weight or rows_per_step"
        )
    return counts


def document_order(seed: int, epoch: int, source: int, shard: int, documents: int) -> np.ndarray:
    """int64 [documents]: the documents of a shard in the order of an epoch."""
    return _permutation(f"documents/{seed}/{epoch}/{source}/{shard}", documents)


def rows_of(lengths: np.ndarray, longest: int, row_length: int) -> list[int]:
    """Documents, packed into rows in their order: row i holds the concepts [i] to [i + 1], counted through them.

    A segment that would be cut by the end of a row begins the next one.

    Args:
        lengths: int64 [documents], concepts of each; one longer than `longest` is several segments.
        longest: concepts of a segment, at most; row_length at most.
        row_length: concepts of a row, at most.

    Returns:
        The begin of each row, and the end of the last one.
    """
    segments = -(-lengths // longest)
    document = np.repeat(np.arange(len(lengths)), segments)
    index = np.arange(len(document)) - (np.cumsum(segments) - segments)[document]  # of a segment in its document
    begins = np.cumsum(lengths) - lengths
    ends = (begins[document] + np.minimum((index + 1) * longest, lengths[document])).tolist()
    rows, at = [0], 0
    while at < len(ends):
        at = bisect_right(ends, rows[-1] + row_length, at)
        rows.append(ends[at - 1])
    return rows


def fingerprint(
    datasets: Sequence[str],
    weights: Sequence[float],
    seed: int,
    rows_per_step: int,
    row_length: int,
    max_segment: int,
    supervised: bool = False,
) -> str:
    """sha256 over all that determines the order of data.

    The number of epochs is not included: it ends the order, but does not change it.

    Args:
        datasets: the fingerprints of the datasets.
        weights: their shares, of any sum.
        seed: of the run.
        rows_per_step: lanes.
        row_length: concepts of a row.
        max_segment: concepts of a segment, at most.
        supervised: whether one of the datasets is, so that rows are cut by their documents' lengths.

    Returns:
        The checksum, in hexadecimal.
    """
    total = sum(Fraction(weight) for weight in weights)
    order = {
        "order": ORDER,
        "datasets": list(datasets),
        "weights": [str(Fraction(weight) / total) for weight in weights],
        "seed": seed,
        "rows_per_step": rows_per_step,
        "row_length": row_length,
        "max_segment": max_segment,
    }
    if supervised:
        order["supervised_order"] = SUPERVISED_ORDER
    return hashlib.sha256(json.dumps(order, sort_keys=True).encode()).hexdigest()


class _Stream:
    """The lanes of one source, laid out epoch by epoch on demand.

    Positions in a lane include the padding in rows of supervised documents.
    """

    def __init__(self, index: int, source: Source, lanes: int, seed: int, limit: int | None, row_length: int) -> None:
        self.index, self.lanes, self.seed, self.limit, self.row_length = index, lanes, seed, limit, row_length
        self.concepts = np.asarray(source.concepts, np.int64)
        self.total = int(self.concepts.sum())
        if self.total == 0:
            raise InputError(f"dataset {index} of the mixture holds no concepts")
        self.packs = source.lengths is not None
        self._lengths = [np.asarray(each, np.int64) for each in source.lengths or ()]
        self._longest = min(source.longest or row_length, row_length)
        self._rows = lru_cache(2 * lanes + ROWS_KEPT)(self._pack)
        self._epochs: list[Epoch] = []
        self._lane_ends = [[0] * lanes]  # before the first epoch, after the first epoch, …
        self._extending = threading.Lock()

    def pieces(self, lane: int, start: int, stop: int) -> list[Piece]:
        """The pieces from `start` to `stop` in a lane; of supervised documents, complete rows."""
        self._extend(lane, stop)
        pieces: list[Piece] = []
        for epoch, shard, end in self._from(lane, start):
            first = end - self._size(epoch, shard)
            until = min(stop, end)
            if until > start:  # a shard may be empty
                pieces.append(self._piece(epoch, shard, start - first, until - first))
                start = until
            if start == stop:
                break
        return pieces

    def upcoming_shards(self, lane: int, start: int, count: int) -> list[int]:
        """The first `count` shards of a lane from `start` on; fewer if it ends."""
        stop = start + 1
        while True:
            self._extend(lane, stop)
            shards = [shard for _, shard, _ in islice(self._from(lane, start), count)]
            if len(shards) == count or len(self._epochs) == self.limit:
                return shards
            stop = self._lane_ends[-1][lane] + 1

    def _from(self, lane: int, start: int) -> Iterator[tuple[int, int, int]]:
        """The shards of a lane from `start` on: epoch, shard, and its end in the lane."""
        epoch = bisect_right(self._lane_ends, start, key=lambda ends: ends[lane]) - 1
        while epoch < len(self._epochs):
            shards, ends, bounds = self._epochs[epoch]
            first, last = bisect_right(ends, start, bounds[lane], bounds[lane + 1]), bounds[lane + 1]
            for at in range(first, last):
                yield epoch, int(shards[at]), ends[at]
            epoch += 1

    def longest_lane(self) -> int:
        """The end of the longest lane after all epochs, whose number has to be limited."""
        self._extend(0, None)
        return max(self._lane_ends[-1])

    def concepts_up_to(self, stop: int) -> int:
        """Concepts of all lanes together, each up to `stop`."""
        if self.packs:
            return sum(self._read_before(lane, stop) for lane in range(self.lanes))
        if self.limit is None:  # no lane ends
            return stop * self.lanes
        self._extend(0, None)
        return int(np.minimum(self._lane_ends[-1], stop).sum())

    def _read_before(self, lane: int, stop: int) -> int:
        """Concepts of a lane up to `stop`, without padding."""
        read = 0
        self._extend(lane, stop)
        for epoch, (shards, ends, bounds) in enumerate(self._epochs):
            last = bounds[lane + 1]
            at = bisect_right(ends, stop, bounds[lane], last)
            read += int(self.concepts[shards[bounds[lane] : at]].sum())
            if at < last:
                begin = ends[at] - self._size(epoch, int(shards[at]))
                if stop > begin:
                    read += self._piece(epoch, int(shards[at]), 0, stop - begin).stop
                break
        return read

    def sizes(self, epoch: int) -> np.ndarray:
        """int64 [shards]: the length of each shard in its lane in an epoch."""
        if not self.packs:
            return self.concepts
        return np.array([self._size(epoch, shard) for shard in range(len(self.concepts))], np.int64)

    def _size(self, epoch: int, shard: int) -> int:
        return self.row_length * (len(self._rows(epoch, shard)) - 1) if self.packs else int(self.concepts[shard])

    def _piece(self, epoch: int, shard: int, start: int, stop: int) -> Piece:
        """A part of a shard; start and stop are positions in its lane, and bounds of rows if it is packed."""
        if self.packs:
            rows = self._rows(epoch, shard)
            start, stop = rows[start // self.row_length], rows[stop // self.row_length]
        return Piece(self.index, epoch, shard, start, stop)

    def _pack(self, epoch: int, shard: int) -> list[int]:
        """The rows of a shard in the order of an epoch."""
        lengths = self._lengths[shard]
        order = document_order(self.seed, epoch, self.index, shard, len(lengths))
        return rows_of(lengths[order], self._longest, self.row_length)

    def _extend(self, lane: int, stop: int | None) -> None:
        """Lay out epochs until the lane reaches `stop` (None: all of them)."""
        if stop is not None and self._lane_ends[-1][lane] >= stop:
            return
        with self._extending:
            while len(self._epochs) != self.limit and (stop is None or self._lane_ends[-1][lane] < stop):
                epoch, lane_ends = self._assign_shards(len(self._epochs), self._lane_ends[-1])
                # In this order: a reader without the lock sees an end only with the epoch that reaches it.
                self._epochs.append(epoch)
                self._lane_ends.append(lane_ends)

    def _assign_shards(self, epoch: int, lane_ends: list[int]) -> tuple[Epoch, list[int]]:
        """An epoch's shards, permuted, each to the lane that is the shortest so far (the lowest of equals)."""
        order = _permutation(f"shards/{self.seed}/{epoch}/{self.index}", len(self.concepts))
        heap = [(end, lane) for lane, end in enumerate(lane_ends)]
        heapq.heapify(heap)
        lanes = np.empty(len(order), np.int32)
        ends = np.empty(len(order), np.int64)
        for i, count in enumerate(self.sizes(epoch)[order].tolist()):
            end, lane = heap[0]
            heapq.heapreplace(heap, (end + count, lane))
            lanes[i], ends[i] = lane, end + count
        by_lane = np.argsort(lanes, kind="stable")
        bounds = np.searchsorted(lanes[by_lane], np.arange(self.lanes + 1)).tolist()
        assigned = Epoch(order[by_lane].astype(np.int32), ends[by_lane].data, bounds)
        return assigned, [end for end, _ in sorted(heap, key=lambda item: item[1])]


def _permutation(name: str, n: int) -> np.ndarray:
    """int64 [n]: a permutation that depends only on `name`, not on the version of numpy.

    numpy guarantees the raw output of its bit generators, but not of its shuffles.
    """
    key = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=16).digest(), "<u8")
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")
