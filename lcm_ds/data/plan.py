"""The plan: the concepts of each row of each step, a pure function of the documents' lengths, a seed and the batch.

The shards of an epoch are dealt to **blocks**. The documents of a block are permuted together and laid end to end,
block after block and epoch after epoch: a **stream**, from which rows are cut one after another. A dataset of a mixture
has a stream, or several (`streams`), each with its own shards and its own lanes: rows of every step.

Where a block begins follows from the number of concepts in its shards, so that any step is found by arithmetic; only
the blocks that it reads are laid out. The ends of rows do not cut supervised documents: their rows hold complete
segments. The plan knows neither world size nor micro-batch.
"""

from __future__ import annotations

import hashlib
import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from lcm_ds.errors import InputError

ORDER = 2  # part of every fingerprint; to be raised when the order changes
# Documents of a block, at most, unless the config says how many shards it has: laid out in a third of a second, and
# 12 bytes each in memory.
BLOCK_DOCUMENTS = 1 << 23
BLOCKS_KEPT = 3  # of a stream: the one that is read, the one before and the next


@dataclass(frozen=True)
class Source:
    """One dataset of a mixture, as the plan sees it."""

    concepts: Sequence[int]  # of each shard, in order of the shards' names
    documents: Sequence[int]  # likewise
    lengths: Callable[[int], np.ndarray]  # shard → concepts of each of its documents, int [documents]
    longest: int  # concepts of a segment, at most
    weight: float = 1.0  # share of the rows
    packs: bool = False  # rows hold complete segments, which therefore fit into a row: of a supervised dataset
    shuffle_shards: int | None = None  # of a block; None: as many as have BLOCK_DOCUMENTS
    streams: int = 1


class Segments(NamedTuple):
    """Parts of documents that attend to one another, in the order of rows: arrays int64 [segments]."""

    row: np.ndarray  # counted from the first row that was asked for
    column: np.ndarray  # of the segment's first concept in its row
    source: np.ndarray
    shard: np.ndarray
    document: np.ndarray  # in its shard, in the shard's own order
    start: np.ndarray  # concepts, counted in the document
    stop: np.ndarray


def _joined(parts: Sequence[tuple[np.ndarray, ...]]) -> Segments:
    """One after another."""
    if not parts:
        return Segments(*(np.empty(0, np.int64) for _ in Segments._fields))
    return Segments(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


class BlockId(NamedTuple):
    """A block of a stream."""

    stream: int
    epoch: int
    number: int  # in its epoch


class Plan:
    """The order of data of a run.

    Safe to use from several threads.
    """

    def __init__(
        self, sources: Sequence[Source], seed: int, rows_per_step: int, row_length: int, epochs: int | None = None
    ) -> None:
        """Share out the lanes.

        Args:
            sources: The datasets.
            seed: Of the permutations.
            rows_per_step: Lanes, allocated to the sources by weight (largest remainder).
            row_length: Concepts of a row.
            epochs: How often each source is read; None for endless.

        Raises:
            InputError: A source has no concepts, its weight gives it no lane, or its lanes or shards cannot be dealt to
                its streams.
        """
        self.seed, self.rows_per_step, self.row_length, self.epochs = seed, rows_per_step, row_length, epochs
        self.lanes_per_source = allocate_lanes([source.weight for source in sources], rows_per_step)
        self._streams: list[_Stream] = []
        self._first_lanes: list[int] = []  # of each stream
        lane = 0
        for index, (source, lanes) in enumerate(zip(sources, self.lanes_per_source, strict=True)):
            if lanes % source.streams or source.streams > len(source.concepts):
                raise InputError(
                    f"data.streams: {source.streams} of dataset {index}, which has {lanes} rows of a step and "
                    f"{len(source.concepts)} shards: has to divide the rows, and each needs a shard"
                )
            for shards in _dealt(len(source.concepts), source.streams, f"streams/{seed}/{index}"):
                stream = _Stream(index, source, shards, lanes // source.streams, seed, epochs, row_length)
                self._streams.append(stream)
                self._first_lanes.append(lane)
                lane += stream.lanes

    def segments(self, step: int, lanes: range) -> Segments:
        """The segments of the rows of consecutive `lanes` (of 0 to rows_per_step − 1) in `step` (from 0), in order.

        A row has row_length concepts; fewer if its stream ends in it, none after that. A row of supervised documents
        has fewer if the next segment would not have fitted. Raises InputError if an index cannot be read.
        """
        found = []
        for index, own in self._own(lanes):
            stream, first = self._streams[index], self._first_lanes[index]
            parts = stream.segments(step * stream.lanes + own.start - first, len(own))
            parts.row[:] += own.start - lanes.start
            found.append(parts)
        return _joined(found)

    def blocks(self, step: int, lanes: range) -> list[BlockId]:
        """The block that each stream of `lanes` reads first in `step`, and the one after it, if there is one."""
        blocks = []
        for index, _ in self._own(lanes):
            epoch, block = self._streams[index].block_of(step * self._streams[index].lanes)
            for each in (epoch * self._streams[index].blocks + block + ahead for ahead in (0, 1)):
                if self.epochs is None or each < self.epochs * self._streams[index].blocks:
                    blocks.append(BlockId(index, *divmod(each, self._streams[index].blocks)))
        return blocks

    def lay_out(self, block: BlockId) -> None:
        """Lay out a block, if it is not yet. Raises InputError as `segments`."""
        self._streams[block.stream].block(block.epoch, block.number)

    def shards(self, block: BlockId) -> tuple[int, np.ndarray]:
        """The source of a block, and its shards: int64, ascending."""
        stream = self._streams[block.stream]
        return stream.source_index, stream.shards_of(block.epoch, block.number)

    def streams(self, source: int, lanes: range) -> int:
        """How many streams of a source some lanes read."""
        return sum(self._streams[index].source_index == source for index, _ in self._own(lanes))

    def most_shards(self, source: int) -> int:
        """The most shards that a block of a source has."""
        return max(stream.most_shards for stream in self._streams if stream.source_index == source)

    @cached_property
    def steps(self) -> int | None:
        """Steps until the last stream ends; None if epochs are unlimited."""
        if self.epochs is None:
            return None
        return max(-(-stream.rows(self.epochs) // stream.lanes) for stream in self._streams)

    def rows(self, source: int) -> int:
        """Rows of an epoch of a source."""
        return sum(stream.rows(1) for stream in self._streams if stream.source_index == source)

    def concepts(self, step: int) -> int:
        """Concepts in the rows before `step`: a stream that has ended adds none."""
        return sum(stream.concepts_before(step * stream.lanes) for stream in self._streams)

    def epoch(self, step: int) -> float:
        """Concepts in the rows before `step`, divided by all concepts."""
        return self.concepts(step) / sum(stream.total for stream in self._streams)

    @cached_property
    def row_slots(self) -> int:
        """Concepts that the rows of the first epoch have room for, padding of supervised documents included."""
        return sum(
            stream.rows(1) * self.row_length if stream.source.packs else stream.total for stream in self._streams
        )

    def _own(self, lanes: range) -> Iterator[tuple[int, range]]:
        """The streams that read some of `lanes`, each with those lanes."""
        for index, (stream, first) in enumerate(zip(self._streams, self._first_lanes, strict=True)):
            own = range(max(first, lanes.start), min(first + stream.lanes, lanes.stop))
            if own:
                yield index, own


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
            f"weights {list(weights)} share {lanes} rows of a step as {counts}: "
            f"dataset {counts.index(0)} would never be read; raise its weight or rows_per_step"
        )
    return counts


def rows_of(lengths: np.ndarray, longest: int, row_length: int) -> np.ndarray:
    """Documents, packed into rows in their order: row i holds the concepts [i] to [i + 1], counted through them.

    A segment that would be cut by the end of a row begins the next one.

    Args:
        lengths: int64 [documents], concepts of each; one longer than `longest` is several segments.
        longest: concepts of a segment, at most; row_length at most.
        row_length: concepts of a row, at most.

    Returns:
        int64 [rows + 1]: the begin of each row, and the end of the last one.
    """
    _, _, ends = _cut_documents(lengths, longest)
    ends = ends.tolist()
    rows, at = [0], 0
    while at < len(ends):
        at = bisect_right(ends, rows[-1] + row_length, at)
        rows.append(ends[at - 1])
    return np.array(rows, np.int64)


def fingerprint(
    datasets: Sequence[str],
    weights: Sequence[float],
    seed: int,
    rows_per_step: int,
    row_length: int,
    max_segment: int,
    shuffle_shards: Sequence[int | None] = (None,),
    streams: int = 1,
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
        shuffle_shards: shards of a block of each dataset, as in `Source`.
        streams: of each dataset.

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
        "shuffle_shards": list(shuffle_shards),
        "streams": streams,
    }
    return hashlib.sha256(json.dumps(order, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Block:
    """The documents of some shards in the order in which an epoch reads them."""

    shards: np.ndarray  # int64, ascending
    firsts: np.ndarray  # int64: documents of the block before each shard
    documents: np.ndarray  # int32 [documents]: counted through the shards, permuted
    ends: np.ndarray  # [documents]: concepts up to the end of each, in that order
    rows: np.ndarray | None  # if rows are packed: see `rows_of`

    def cut(self, begin: int, end: int, bounds: np.ndarray, longest: int) -> tuple[np.ndarray, ...]:
        """The segments of the concepts `begin` to `end`, counted through the permuted documents.

        A document longer than `longest` is wrapped: cut at multiples of `longest`, counted from its first concept,
        independent of where rows begin and end.

        Args:
            begin: the first concept.
            end: behind the last one.
            bounds: where rows end in between.
            longest: concepts of a segment, at most.

        Returns:
            int64 [segments] each: the segment's first concept, its shard, its document in the shard, its first
            concept in the document, and its last one there plus 1.
        """
        wanted = np.array([begin, end - 1], self.ends.dtype)  # of another type, it would copy all of them
        first, last = np.searchsorted(self.ends, wanted, side="right").tolist()
        ends = self.ends[first : last + 1].astype(np.int64)
        before = int(self.ends[first - 1]) if first else 0
        lengths = np.diff(ends, prepend=before)
        begins, _, _ = _cut_documents(lengths, longest)
        begins = begins + before
        cuts = np.unique(np.concatenate([[begin], begins[(begins > begin) & (begins < end)], bounds]))
        at = np.searchsorted(ends, cuts, side="right")
        offsets = cuts - (ends - lengths)[at]
        numbers = self.documents[first + at].astype(np.int64)
        shard = np.searchsorted(self.firsts, numbers, side="right") - 1
        starts, stops = offsets, offsets + np.diff(cuts, append=end)
        return cuts, self.shards[shard], numbers - self.firsts[shard], starts, stops


def _cut_documents(lengths: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents laid end to end, cut at multiples of `longest` in each: begin, document and end of each segment."""
    counts = -(-lengths // longest)
    document = np.repeat(np.arange(len(lengths)), counts)
    index = np.arange(len(document)) - (np.cumsum(counts) - counts)[document]  # of a segment in its document
    document_ends = np.cumsum(lengths)
    begins = (document_ends - lengths)[document] + index * longest
    return begins, document, np.minimum(begins + longest, document_ends[document])


class _Stream:
    """The rows of some lanes: shards of one source, block after block and epoch after epoch."""

    def __init__(
        self,
        source_index: int,
        source: Source,
        shards: np.ndarray,
        lanes: int,
        seed: int,
        limit: int | None,
        row_length: int,
    ) -> None:
        self.source_index, self.source, self.lanes = source_index, source, lanes
        self._shards, self._limit, self._row_length = shards, limit, row_length
        # The order of a stream depends on its shards, not on how many streams there are.
        self._name = f"{seed}/{source_index}/{int(shards[0])}"
        self._concepts = np.asarray(source.concepts, np.int64)[shards]
        self.total = int(self._concepts.sum())
        if self.total == 0:
            raise InputError(f"dataset {source_index} of the mixture holds no concepts")
        if source.shuffle_shards is None:
            documents = int(np.asarray(source.documents, np.int64)[shards].sum())
            self.blocks = min(len(shards), max(1, -(-documents // BLOCK_DOCUMENTS)))
        else:
            self.blocks = -(-len(shards) // source.shuffle_shards)
        self.most_shards = -(-len(shards) // self.blocks)  # of a block
        self._epoch = lru_cache(4)(self._deal_epoch)
        self._laid_out: OrderedDict[tuple[int, int], Future[_Block]] = OrderedDict()
        self._lock = threading.Lock()
        self._row_ends = [0]  # packed rows up to the end of each block, epoch after epoch, as far as they are known
        self._counting = threading.Lock()

    def segments(self, first: int, rows: int) -> Segments:
        """The segments of `rows` rows from row `first` of the stream on."""
        found: list[tuple[np.ndarray, ...]] = []
        for epoch, index, begin, end in self._ranges(first, rows):
            block = self.block(epoch, index)
            if block.rows is not None:
                own = block.rows[begin : end + 1]
                cuts, *where = block.cut(int(own[0]), int(own[-1]), own[1:-1], self.source.longest)
                row = np.searchsorted(own, cuts, side="right") - 1
                column = cuts - own[row]
                row += self._rows_before(epoch, index) + begin - first
            else:
                before = epoch * self.total + int(self._epoch(epoch)[1][index])  # the block's begin in the stream
                length = self._row_length
                bounds = np.arange(-(-(before + begin + 1) // length) * length, before + end, length) - before
                cuts, *where = block.cut(begin, end, bounds, self.source.longest)
                row, column = np.divmod(before + cuts, length)
                row -= first
            found.append((row, column, np.full_like(row, self.source_index), *where))
        return _joined(found)

    def block(self, epoch: int, index: int) -> _Block:
        """A block, laid out if it is not; the least recently used one is dropped for it."""
        key = (epoch, index)
        with self._lock:
            future = self._laid_out.get(key)
            if missing := future is None or (future.done() and future.exception() is not None):
                while len(self._laid_out) >= BLOCKS_KEPT:
                    self._laid_out.popitem(last=False)
                future = self._laid_out[key] = Future()
            self._laid_out.move_to_end(key)
        assert future is not None
        if missing:
            try:
                future.set_result(self._lay_out(epoch, index))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def block_of(self, row: int) -> tuple[int, int]:
        """Epoch and index of the block that a row begins in; of the last one for a row behind the end."""
        if self.source.packs:
            at = self._find_packed(row)
            return divmod(at, self.blocks)
        epoch, position = divmod(row * self._row_length, self.total)
        if self._limit is not None and epoch >= self._limit:
            return self._limit - 1, self.blocks - 1
        return epoch, bisect_right(self._epoch(epoch)[1], position) - 1

    def shards_of(self, epoch: int, index: int) -> np.ndarray:
        """The shards of a block: int64, ascending."""
        return self._shards[self._epoch(epoch)[0] == index]

    def rows(self, epochs: int) -> int:
        """Rows of the first `epochs` epochs."""
        if not self.source.packs:
            return -(-epochs * self.total // self._row_length)
        self._count_rows(blocks=epochs * self.blocks)
        return self._row_ends[epochs * self.blocks]

    def concepts_before(self, row: int) -> int:
        """Concepts in the rows before `row`."""
        if not self.source.packs:
            concepts = row * self._row_length
            return concepts if self._limit is None else min(concepts, self._limit * self.total)
        at = self._find_packed(row)
        epoch, index = divmod(at, self.blocks)
        rows = self.block(epoch, index).rows
        assert rows is not None
        begin = int(self._epoch(epoch)[1][index])
        return epoch * self.total + begin + int(rows[min(row - self._row_ends[at], len(rows) - 1)])

    def _ranges(self, first: int, rows: int) -> Iterator[tuple[int, int, int, int]]:
        """The parts of blocks that rows read: epoch, index, begin and end, in rows of the block if they are packed,
        else in concepts."""
        if self.source.packs:
            at, row = self._find_packed(first), first
            while row < first + rows and (self._limit is None or at < self._limit * self.blocks):
                self._count_rows(blocks=at + 1)
                begin, end = self._row_ends[at], self._row_ends[at + 1]
                until = min(end, first + rows)
                if row < until:
                    yield *divmod(at, self.blocks), row - begin, until - begin
                    row = until
                at += 1
            return
        start, stop = first * self._row_length, (first + rows) * self._row_length
        if self._limit is not None:
            stop = min(stop, self._limit * self.total)
        while start < stop:
            epoch, position = divmod(start, self.total)
            begins = self._epoch(epoch)[1]
            index = bisect_right(begins, position) - 1
            until = min(begins[index + 1], position + stop - start)
            yield epoch, index, position - begins[index], until - begins[index]
            start += until - position

    def _deal_epoch(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """The block of each shard of the stream in an epoch, and the concepts before each block, and before its end."""
        blocks = _deal(len(self._shards), self.blocks, f"blocks/{self._name}/{epoch}")
        sizes = np.zeros(self.blocks, np.int64)
        np.add.at(sizes, blocks, self._concepts)
        return blocks, [0, *np.cumsum(sizes).tolist()]

    def _lay_out(self, epoch: int, index: int) -> _Block:
        shards = self.shards_of(epoch, index)
        lengths = [np.asarray(self.source.lengths(shard), np.int32) for shard in shards.tolist()]
        counts = np.array([len(each) for each in lengths], np.int64)
        together = np.concatenate(lengths)
        documents = permutation(f"documents/{self._name}/{epoch}/{index}", len(together))
        in_order = together[documents]
        ends = np.cumsum(in_order, dtype=np.int64)
        begins = self._epoch(epoch)[1]
        assert (int(ends[-1]) if len(ends) else 0) == begins[index + 1] - begins[index], "lengths of documents"
        rows = rows_of(in_order.astype(np.int64), self.source.longest, self._row_length) if self.source.packs else None
        if len(ends) and ends[-1] < 1 << 32:
            ends = ends.astype(np.uint32)
        return _Block(shards, np.cumsum(counts) - counts, documents, ends, rows)

    def _rows_before(self, epoch: int, index: int) -> int:
        return self._row_ends[epoch * self.blocks + index]

    def _find_packed(self, row: int) -> int:
        """The block, counted over all epochs, that holds a row; the last one if all end before it."""
        self._count_rows(row=row)
        at = bisect_right(self._row_ends, row) - 1
        return at if self._limit is None else min(at, self._limit * self.blocks - 1)

    def _count_rows(self, row: int = -1, blocks: int = 0) -> None:
        """Count the rows of packed blocks, up to that of `row` and for at least so many blocks."""
        with self._counting:
            while len(self._row_ends) <= blocks or self._row_ends[-1] <= row:
                at = len(self._row_ends) - 1
                if self._limit is not None and at >= self._limit * self.blocks:
                    return
                rows = self.block(*divmod(at, self.blocks)).rows
                assert rows is not None
                self._row_ends.append(self._row_ends[-1] + len(rows) - 1)


def permutation(name: str, n: int) -> np.ndarray:
    """int32 [n] (int64 if that is too small): a permutation that depends only on `name`, not on the version of numpy.

    numpy guarantees the raw output of its bit generators, but not of its shuffles. Random numbers are sorted that have
    the position in their last bits: no two are equal, so that any sort gives the same, and the fastest is taken.
    """
    bits = max(1, (n - 1).bit_length())
    keys = _random(name, n)
    keys >>= np.uint64(bits)
    keys <<= np.uint64(bits)
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort()
    keys &= np.uint64((1 << bits) - 1)
    return keys.astype(np.int32 if bits < 32 else np.int64)


def _random(name: str, n: int) -> np.ndarray:
    """uint64 [n]: random numbers that depend only on `name`."""
    key = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=16).digest(), "<u8")
    return np.random.Philox(key=key).random_raw(n)


def _deal(n: int, hands: int, name: str) -> np.ndarray:
    """int64 [n]: deal n shards to `hands`, a random one of each `hands` consecutive shards to each of them.

    Shards that lie together are often alike: so each hand gets its share of everything.
    """
    if hands == 1:
        return np.zeros(n, np.int64)
    order = np.lexsort((_random(name, n), np.arange(n) // hands))
    dealt = np.empty(n, np.int64)
    dealt[order] = np.arange(n) % hands
    return dealt


def _dealt(n: int, hands: int, name: str) -> list[np.ndarray]:
    """The shards of each hand, ascending."""
    dealt = _deal(n, hands, name)
    return [np.flatnonzero(dealt == hand) for hand in range(hands)]
