"""The loader: the plan's rows as batches, read ahead by threads.

Promises the same global batches in the same order for any world size, micro-batch and number of threads: a batch is a
pure function of (step, index), so nothing has to be saved to resume but the step.
"""

from __future__ import annotations

import logging
import resource
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, count
from threading import Event, Lock
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lcm_ds.data.buffers import Buffers
from lcm_ds.data.format import Dataset
from lcm_ds.data.plan import Piece, Plan, document_order
from lcm_ds.data.remote.fetch import Stopped
from lcm_ds.data.rows import Row, Segment, ShuffledShard, blank, cut, fill
from lcm_ds.data.shard import Shard, open_shard, prefetch
from lcm_ds.data.supervised import longest_segment, source_of
from lcm_ds.errors import InputError, TransientError

logger = logging.getLogger(__name__)

# Shards of local datasets that are open at a time: two for each lane, and at least so many.
FEWEST_OPEN = 32
# Those of a reader of one row after the other, where what is open takes room in a cache.
FEWEST_KEPT = 2
# How many of each lane are made ready before they are read, the one it is in included; threads that fetch them.
AHEAD, FETCHED_AT_A_TIME = 2, 8
# With bad shards left out: the share of the shards opened so far from which on something else must be wrong.
MOST_BAD = 0.05
AGAIN_SECONDS = 60.0  # after which one that could not be had for the time being is tried again
VALIDATION_SEED = 0
VALIDATION_AHEAD = 2  # batches


def target_mask(segment_ids: Tensor, given: Tensor | None = None) -> Tensor:
    """Which concepts are targets: every concept of a segment but its first, and none that is given.

    segment_ids: [rows, row_length], -1 where there are no concepts; given: bool [rows, row_length]. Returns bool [rows,
    row_length - 1]; entry t says whether concept t + 1 has to be predicted from concept t.
    """
    mask = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] >= 0)
    return mask if given is None else mask & ~given[:, 1:]


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank."""

    concepts: Tensor  # [rows, row_length, embed_dim], raw space, stored dtype; zeros where there are none
    segment_ids: Tensor  # int32 [rows, row_length]: 0, 1, 2 … in a row; −1 where there are no concepts
    step: int
    index: int  # of the micro-batch in its step
    first_lane: int  # of its first row, counted over all ranks; validation: the number of its first row
    missing: int = 0  # concepts of shards that could not be read; rows without targets are in their place
    # of validation, int64 [rows, row_length, 2]: a concept's document, counted through the dataset in the order of its
    # shards, and its position in that; −1 where there are no concepts
    origins: Tensor | None = None
    # of supervised datasets, bool [rows, row_length]: concepts that are no targets, for they are of a document's source
    # or of a segment that does not begin with it
    given: Tensor | None = None

    @property
    def target_mask(self) -> Tensor:
        """Which concepts the model has to predict: bool [rows, row_length - 1] (see `target_mask`)."""
        return target_mask(self.segment_ids, self.given)

    @property
    def targets(self) -> int:
        """Concepts that the model has to predict."""
        return int(self.target_mask.sum())

    @property
    def real_concepts(self) -> int:
        """Concepts that are not padding."""
        return int((self.segment_ids >= 0).sum())


class Loader:
    """The batches of one rank, from `start_step` on, in order; without end where the plan has none.

    Of the rows of a step, rank r of W has a contiguous run of lanes, and its micro-batch i the i-th run of
    micro_batch_rows of those. workers: threads that read ahead, as many micro-batches as a step has of this rank, and
    two more than twice their number at least: so many batches lie in memory; 0 reads when asked. As many threads again
    make the coming shard of every lane ready: fetched, its checksum compared. An error in a thread is raised
    where its batch would have come. pinned: batches lie in page-locked memory. local_ranks: processes of this node,
    which share a cache: it has to hold a shard for each lane and worker of theirs, and two more a rank for validation.
    left_out: steps that are passed over.

    Where a dataset has skip_bad, a shard that cannot be read is logged and left out, its concepts become rows without
    targets; one that its server gave no answer for is tried again when it is needed a minute later. It stops with the
    error all the same once more than MOST_BAD of the shards opened, and more than one, are left out. Raises InputError
    where rows_per_step does not divide, a cache is too small, or lanes are more than the files that this process may
    open.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        plan: Plan,
        max_segment: int,
        rank: int,
        world_size: int,
        micro_batch_rows: int,
        workers: int = 1,
        start_step: int = 0,
        pinned: bool = False,
        local_ranks: int = 1,
        left_out: Sequence[range] = (),
    ) -> None:
        if plan.rows_per_step % (world_size * micro_batch_rows):
            raise InputError(
                f"batch.rows_per_step: {plan.rows_per_step} is not a multiple of "
                f"{world_size} ranks × {micro_batch_rows} micro_batch_rows"
            )
        self.plan, self.micro_batch_rows = plan, micro_batch_rows
        self._start_step, self._left_out = start_step, left_out
        lanes = plan.rows_per_step // world_size
        self.lanes = range(rank * lanes, (rank + 1) * lanes)
        self.micro_batches = lanes // micro_batch_rows  # a step
        self._stopped = Event()
        least = lanes + max(1, workers)
        for dataset in datasets:
            if dataset.any_elsewhere and dataset.cache is not None:
                # Of a mixture, as if all its shards were of this dataset's size.
                largest = max(shard.bytes for shard in dataset.shards)
                dataset.cache.check_room(local_ranks * (least + FEWEST_KEPT), largest)
        self._rows = _Rows(
            datasets, plan, max_segment, micro_batch_rows, least, 2 * lanes, pinned=pinned, stopped=self._stopped
        )
        self._ahead = max(2 * workers + 2, self.micro_batches)
        self._pool = ThreadPoolExecutor(workers, "lcm-ds-loader") if workers else None
        self._looking = ShardPrefetcher(datasets, plan, self.lanes, workers, self._stopped)

    def __iter__(self) -> Iterator[Batch]:
        if self._pool is None:
            yield from (self.read(step, index) for step, index in self._order())
            return
        yield from _read_ahead(self._pool, self._ahead, (partial(self.read, *place) for place in self._order()))

    def read(self, step: int, index: int) -> Batch:
        """Micro-batch `index` of `step`."""
        first_lane = self.lanes.start + index * self.micro_batch_rows
        places = [(step, first_lane + row) for row in range(self.micro_batch_rows)]
        return self._rows.batch(places, step, index, first_lane)

    def close(self) -> None:
        """End the threads; what they read ahead is dropped, and what they are fetching given up.

        One that waits for a server's next byte does so for remote.READ_TIMEOUT at most.
        """
        self._stopped.set()
        self._looking.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _order(self) -> Iterator[tuple[int, int]]:
        for step in count(self._start_step) if self.plan.steps is None else range(self._start_step, self.plan.steps):
            if any(step in steps for steps in self._left_out):
                continue
            self._looking.reach(step)
            yield from ((step, index) for index in range(self.micro_batches))


def _read_ahead(pool: ThreadPoolExecutor, ahead: int, reads: Iterator[Callable[[], Batch]]) -> Iterator[Batch]:
    """What `reads` give, in their order; threads of the pool are `ahead` batches ahead."""
    coming: deque[Future[Batch]] = deque()
    while True:
        for read in reads:
            coming.append(pool.submit(read))
            if len(coming) > ahead:
                break
        if not coming:
            return
        yield coming.popleft().result()


def validation_batches(
    dataset: Dataset,
    row_length: int,
    max_segment: int,
    micro_batch_rows: int,
    rank: int,
    world_size: int,
    rows: int | None = None,
    origins: bool = False,
) -> Iterator[Batch]:
    """This rank's part of the whole dataset, or of its first `rows` rows, in an order that is always the same.

    Batch b of all, in the order of the rows, is rank b mod world_size's: what is in a batch does not depend on who
    reads it. Every rank has the same number of batches. No row comes twice: the last ones are filled up with rows
    without concepts. A thread reads ahead. Bad shards: as of `Loader`.
    """
    plan = Plan([source_of(dataset, row_length, max_segment)], VALIDATION_SEED, 1, row_length, epochs=1)
    assert plan.steps is not None
    beyond = plan.steps
    rows = beyond if rows is None else min(rows, beyond)
    reader = _Rows([dataset], plan, max_segment, micro_batch_rows, FEWEST_KEPT, FEWEST_OPEN)

    def read(index: int) -> Batch:
        first = (index * world_size + rank) * micro_batch_rows
        # One lane, so that a step is a row; after the last step there are no concepts.
        places = [(row if row < rows else beyond, 0) for row in range(first, first + micro_batch_rows)]
        return reader.batch(places, 0, index, first, origins)

    batches = range(-(-rows // (world_size * micro_batch_rows)))
    pool = ThreadPoolExecutor(1, "lcm-ds-validation")
    try:
        yield from _read_ahead(pool, VALIDATION_AHEAD, (partial(read, index) for index in batches))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class TraceLine(NamedTuple):
    """A segment of a step, and the document that it is of."""

    lane: int
    segment: int  # in the row
    dataset: str  # where it is
    shard: str
    key: str
    id: str
    sentences: tuple[str, ...]  # of the segment; none where the dataset keeps none
    start: int  # concepts, counted in the document
    stop: int


def trace(
    datasets: Sequence[Dataset], plan: Plan, max_segment: int, steps: range, lanes: range | None = None
) -> Iterator[tuple[int, list[TraceLine]]]:
    """Each step, and all its segments, lane by lane; of some `lanes` alone where they are given. Bad shards: as of
    `Loader`.

    Little of a shard is read for it: datasets opened without `checksums` save reading all of it.
    """
    rows = _Rows(datasets, plan, max_segment, 1, FEWEST_KEPT, plan.rows_per_step)
    for step in steps:
        yield step, [line for lane in lanes or range(plan.rows_per_step) for line in _trace_row(rows, step, lane)]


def _trace_row(rows: _Rows, step: int, lane: int) -> list[TraceLine]:
    lines: list[TraceLine] = []
    for piece in rows.plan.pieces(step, lane):
        with rows.skipping(piece):
            lines += [
                _trace_line(lane, number, rows.datasets[piece.source].path, segment)
                for number, segment in enumerate(rows.segments(piece), start=len(lines))
            ]
    return lines


def _trace_line(lane: int, number: int, dataset: str, segment: Segment) -> TraceLine:
    shard, document, start, stop = segment
    meta = shard.meta(document)
    sentences = tuple(map(str, meta["sentences"][start:stop]))
    return TraceLine(lane, number, dataset, shard.name, shard.keys[document], str(meta["id"]), sentences, start, stop)


class _Rows:
    """Rows of a plan, read from its datasets. Safe to use from several threads.

    least, most: of shards that are open at a time; the smaller one where a dataset is elsewhere, for what is open takes
    room in the cache. Raises InputError where this process may not open so many files.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        plan: Plan,
        max_segment: int,
        micro_batch_rows: int,
        least: int,
        most: int,
        pinned: bool = False,
        stopped: Event | None = None,
    ) -> None:
        self.datasets, self.plan = datasets, plan
        self._longest = [longest_segment(dataset, plan.row_length, max_segment) for dataset in datasets]
        # Else rows would cut supervised documents: targets without a source, unnoticed.
        assert all(plan.packs(i) == (each.info.supervised is not None) for i, each in enumerate(datasets)), "source_of"
        dtype = torch.float32 if any(d.info.dtype in ("float32", "bfloat16") for d in datasets) else torch.float16
        self._buffers = Buffers((micro_batch_rows, plan.row_length, datasets[0].embed_dim), dtype, pinned)
        elsewhere = any(dataset.any_elsewhere for dataset in datasets)
        self._most = _open_files(least, least if elsewhere else max(most, FEWEST_OPEN))
        # Futures, so that a thread that needs a shard waits for the one that is opening it, and for no other.
        self._open: OrderedDict[tuple[int, int, int], Future[ShuffledShard]] = OrderedDict()
        # The same shards by (source, shard): the next epoch of a small dataset finds them open.
        self._shards: WeakValueDictionary[tuple[int, int], Shard] = WeakValueDictionary()
        self._lock = Lock()
        self._stopped = stopped
        self._tried = set[tuple[int, int]]()
        self._left_out: dict[tuple[int, int], InputError] = {}
        self._away: dict[
            tuple[int, int], tuple[float, TransientError]
        ] = {}  # until when it is not tried again, and why
        self._supervised = any(dataset.info.supervised is not None for dataset in datasets)
        # Documents before each shard of a dataset.
        self._before = [[*accumulate((s.documents for s in d.shards), initial=0)] for d in datasets]

    def batch(
        self, places: Sequence[tuple[int, int]], step: int, index: int, first_lane: int, origins: bool = False
    ) -> Batch:
        """The rows at `places`, each a step and a lane, as one batch."""
        concepts = self._buffers.take()
        shape = concepts.shape[:2]
        segment_ids = torch.empty(shape, dtype=torch.int32)
        given = torch.empty(shape, dtype=torch.bool) if self._supervised else None
        origin = torch.empty(*shape, 2, dtype=torch.int64) if origins else None
        arrays = [None if tensor is None else tensor.numpy() for tensor in (concepts, segment_ids, given, origin)]
        missing = 0
        for number, (at, lane) in enumerate(places):
            row = Row(*(None if array is None else array[number] for array in arrays))  # type: ignore[arg-type]
            missing += self._fill(self.plan.pieces(at, lane), row)
        return Batch(concepts, segment_ids, step, index, first_lane, missing, origin, given)

    def _fill(self, pieces: Sequence[Piece], row: Row) -> int:
        """Copy pieces to their row; returns how many of its concepts could not be read."""
        filled = number = missing = 0
        for piece in pieces:
            part = row.part(slice(filled, filled := filled + piece.stop - piece.start))
            with self.skipping(piece) as left_out:
                number = fill(self.segments(piece), part, number)
                if part.origins is not None:
                    part.origins[:, 0] += self._before[piece.source][piece.shard]
            if left_out:
                blank(part)
                missing += piece.stop - piece.start
        blank(row.part(slice(filled, None)))
        return missing

    def segments(self, piece: Piece) -> Iterator[Segment]:
        """The segments of a piece, in order."""
        return cut(self._in_order(piece), piece.start, piece.stop, self._longest[piece.source])

    @contextmanager
    def skipping(self, piece: Piece) -> Iterator[list[InputError]]:
        """What cannot be read of the piece's shard is noted, and in the list that is yielded.

        Raised all the same where its dataset does not skip bad shards, or too many of them are.
        """
        left_out: list[InputError] = []
        try:
            yield left_out
        except InputError as error:
            self._leave_out(piece, error)
            left_out.append(error)

    def _in_order(self, piece: Piece) -> ShuffledShard:
        """A shard in the order of an epoch; the one that nobody has used for longest is closed before it is opened."""
        key = (piece.source, piece.epoch, piece.shard)
        with self._lock:
            future = self._open.get(key)
            if future is not None and future.done() and isinstance(future.exception(), TransientError):
                future = None
            if opener := future is None:
                if len(self._open) >= self._most:
                    self._close_one()
                future = self._open[key] = Future()
            else:
                self._open.move_to_end(key)
        assert future is not None
        if opener:
            try:
                shard = self._shard(piece.source, piece.shard)
                order = document_order(self.plan.seed, piece.epoch, piece.source, piece.shard, len(shard))
                future.set_result(ShuffledShard.of(shard, order))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def _close_one(self) -> None:
        """Close the shard that nobody has used for longest, and none that is being opened."""
        oldest = next((key for key, future in self._open.items() if future.done()), None)
        if oldest is not None:
            del self._open[oldest]

    def _shard(self, source: int, shard: int) -> Shard:
        with self._lock:
            found = self._shards.get((source, shard))
            self._tried.add((source, shard))
            until, away = self._away.get((source, shard), (0.0, None))
        if away is not None and time.monotonic() < until:
            raise away
        if found is None:
            try:
                found = open_shard(self.datasets[source], shard, self._stopped)
            except TransientError as error:
                self._away[source, shard] = time.monotonic() + AGAIN_SECONDS, error
                raise
            with self._lock:
                self._shards[source, shard] = found
                if self._away.pop((source, shard), None):
                    self._left_out.pop((source, shard), None)
        return found

    def _leave_out(self, piece: Piece, error: InputError) -> None:
        """Note a shard that cannot be read; raise the error where that is too much."""
        if not self.datasets[piece.source].skip_bad:
            raise error
        key = (piece.source, piece.shard)
        with self._lock:
            before, self._left_out[key] = self._left_out.get(key), error
            bad, tried = len(self._left_out), len(self._tried)
        if before is not None and isinstance(before, TransientError) == isinstance(error, TransientError):
            return
        if bad > max(1, MOST_BAD * tried):
            raise type(error)(
                [*error.errors, f"{bad} of {tried} shards could not be read: too many to leave out (on_bad_shard)"]
            ) from error
        for line in error.errors:
            logger.error("left out for now: %s" if isinstance(error, TransientError) else "left out: %s", line)


def _open_files(least: int, most: int) -> int:
    """How many shards this process may have open, of `most` wanted: half of the files that it may open.

    The limit of those is raised where it can be. Raises InputError where it is less than `least`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = max(soft, 4 * most)
    if soft < 2 * most and soft < hard:
        soft = min(2 * most, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    if soft // 2 < least:
        raise InputError(
            f"ulimit -n: this process may open {soft} files; it has {least} shards open at a time, one a lane and one "
            f"a worker, and other files: at least {2 * least}"
        )
    return min(most, soft // 2)


class ShardPrefetcher:
    """Makes the coming shards of lanes ready: fetched where they are elsewhere, and their checksums compared."""

    def __init__(self, datasets: Sequence[Dataset], plan: Plan, lanes: range, workers: int, stopped: Event) -> None:
        self.datasets, self.plan, self._stopped = datasets, plan, stopped
        elsewhere = any(dataset.any_elsewhere for dataset in datasets)
        self._pool = ThreadPoolExecutor(max(1, workers, FETCHED_AT_A_TIME * elsewhere), "lcm-ds-ahead")
        self._asked: dict[int, list[int]] = {lane: [] for lane in lanes}  # shards of each lane
        self._again: set[tuple[int, int]] = set()  # of a lane, a shard that could not be had

    def reach(self, step: int) -> None:
        """Ask for what the lanes read from `step` on."""
        for lane, asked in self._asked.items():
            self._asked[lane] = coming = self.plan.coming(step, lane, AHEAD)
            for shard in coming:
                if shard not in asked or (lane, shard) in self._again:
                    self._again.discard((lane, shard))
                    self._pool.submit(self._look, lane, shard)

    def _look(self, lane: int, shard: int) -> None:
        # An error comes again where the shard is read.
        with suppress(InputError, Stopped):
            if shard not in self._asked[lane] or self._stopped.is_set():  # the lane is past it
                return
            if not prefetch(self.datasets[self.plan.source_of(lane)], shard, self._stopped):
                self._again.add((lane, shard))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
