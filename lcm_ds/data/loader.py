"""The loader: the plan's rows as batches, read ahead by threads.

Promises the same global batches in the same order for any world size, micro-batch and number of threads: a batch is a
pure function of (step, index), so nothing has to be saved to resume but the step.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from threading import Event, Lock
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lcm_ds.data.buffers import Buffers
from lcm_ds.data.format import Dataset
from lcm_ds.data.plan import Piece, Plan, Source, document_order
from lcm_ds.data.reader import Shard, open_shard
from lcm_ds.data.remote import Stopped
from lcm_ds.data.rows import Gap, Segment, ShardInOrder, cut, fill_row
from lcm_ds.errors import InputError

logger = logging.getLogger(__name__)

# Open shards: at least a few more than lanes, but not so many that file descriptors run out.
FEWEST_OPEN, MOST_OPEN = 32, 512
# Of shards that are elsewhere: how many of each lane are fetched before they are read, and how many at a time.
FETCHED_AHEAD, FETCHED_AT_A_TIME = 2, 8
# With bad shards left out: the share of the shards opened so far from which on something else must be wrong.
MOST_BAD = 0.05
VALIDATION_SEED = 0


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank."""

    concepts: Tensor  # [rows, row_length, embed_dim], raw space, stored dtype; zeros where there are none
    segment_ids: Tensor  # int32 [rows, row_length]: 0, 1, 2 … in a row; −1 where there are no concepts
    step: int
    index: int  # of the micro-batch in its step
    first_lane: int  # of its first row, counted over all ranks; validation: the number of its first row
    missing: int = 0  # concepts of shards that could not be read; rows without targets are in their place

    @property
    def targets(self) -> int:
        """Concepts that the model has to predict: all of each segment but its first."""
        ids = self.segment_ids
        return int(((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)).sum())

    @property
    def real_concepts(self) -> int:
        """Concepts that are not padding."""
        return int((self.segment_ids >= 0).sum())


class Loader:
    """The batches of one rank, from `start_step` on, in order; without end where the plan has none.

    Of the rows of a step, rank r of W has a contiguous run of lanes, and its micro-batch i the i-th run of
    micro_batch_rows of those. workers: threads that read ahead; 0 reads when asked. An error in a thread is raised
    where its batch would have come. pinned: batches lie in page-locked memory. skip_bad: a shard that cannot be read is
    logged and left out, its concepts become rows without targets; it stops with the error all the same once more than
    MOST_BAD of the shards opened, and more than one, were bad. Raises InputError where rows_per_step does not divide.
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
        skip_bad: bool = False,
    ) -> None:
        if plan.rows_per_step % (world_size * micro_batch_rows):
            raise InputError(
                f"batch.rows_per_step: {plan.rows_per_step} is not a multiple of "
                f"{world_size} ranks × {micro_batch_rows} micro_batch_rows"
            )
        self.plan, self.micro_batch_rows, self.start_step = plan, micro_batch_rows, start_step
        lanes = plan.rows_per_step // world_size
        self._lanes = range(rank * lanes, (rank + 1) * lanes)
        self.micro_batches = lanes // micro_batch_rows  # a step
        self._rows = _Rows(datasets, plan, max_segment, micro_batch_rows, 2 * lanes, pinned, skip_bad)
        self._ahead = 2 * workers + 2
        self._pool = ThreadPoolExecutor(workers, "lcm-ds-loader") if workers else None
        self._fetching = _Fetching(datasets, plan, self._lanes)

    def __iter__(self) -> Iterator[Batch]:
        if self._pool is None:
            yield from (self.read(step, index) for step, index in self._order())
            return
        order = self._order()
        coming: deque[Future[Batch]] = deque()
        while True:
            for step, index in order:
                coming.append(self._pool.submit(self.read, step, index))
                if len(coming) > self._ahead:
                    break
            if not coming:
                return
            yield coming.popleft().result()

    def read(self, step: int, index: int) -> Batch:
        """Micro-batch `index` of `step`."""
        first_lane = self._lanes.start + index * self.micro_batch_rows
        places = [(step, first_lane + row) for row in range(self.micro_batch_rows)]
        return self._rows.batch(places, step, index, first_lane)

    def close(self) -> None:
        """End the threads; what they read ahead is dropped."""
        self._fetching.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _order(self) -> Iterator[tuple[int, int]]:
        for step in count(self.start_step) if self.plan.steps is None else range(self.start_step, self.plan.steps):
            self._fetching.reach(step)
            yield from ((step, index) for index in range(self.micro_batches))


def validation_batches(
    dataset: Dataset,
    row_length: int,
    max_segment: int,
    micro_batch_rows: int,
    rank: int,
    world_size: int,
    rows: int | None = None,
    skip_bad: bool = False,
) -> Iterator[Batch]:
    """This rank's part of the whole dataset, or of its first `rows` rows, in an order that is always the same.

    Every rank has the same number of batches. No row comes twice: the last ones are filled up with rows without
    concepts. skip_bad: as of `Loader`.
    """
    plan = Plan([Source([shard.concepts for shard in dataset.shards])], VALIDATION_SEED, 1, row_length, epochs=1)
    assert plan.steps is not None
    rows = plan.steps if rows is None else min(rows, plan.steps)
    reader = _Rows([dataset], plan, max_segment, micro_batch_rows, FEWEST_OPEN, skip_bad=skip_bad)
    for index in range(-(-rows // (world_size * micro_batch_rows))):
        first = (index * world_size + rank) * micro_batch_rows
        # One lane, so that a step is a row; after the last step there are no concepts.
        places = [(row if row < rows else plan.steps, 0) for row in range(first, first + micro_batch_rows)]
        yield reader.batch(places, 0, index, first)


class TraceLine(NamedTuple):
    """A segment of a step, and the document that it is of."""

    lane: int
    segment: int  # in the row
    shard: str
    key: str
    id: str
    sentences: tuple[str, ...]  # of the segment; none where the dataset keeps none
    start: int  # concepts, counted in the document
    stop: int


def trace(
    datasets: Sequence[Dataset], plan: Plan, max_segment: int, steps: range, skip_bad: bool = False
) -> Iterator[tuple[int, list[TraceLine]]]:
    """Each step, and all its segments, lane by lane; skip_bad: as of `Loader`."""
    rows = _Rows(datasets, plan, max_segment, 1, plan.rows_per_step, skip_bad=skip_bad)
    for step in steps:
        yield step, _trace_step(rows, step)


def _trace_step(rows: _Rows, step: int) -> list[TraceLine]:
    return [
        _trace_line(lane, number, segment)
        for lane in range(rows.plan.rows_per_step)
        for number, segment in enumerate(rows.segments(step, lane))
        if isinstance(segment, Segment)
    ]


def _trace_line(lane: int, number: int, segment: Segment) -> TraceLine:
    shard, document, start, stop = segment
    meta = shard.meta(document)
    sentences = tuple(map(str, meta["sentences"][start:stop]))
    return TraceLine(lane, number, shard.name, shard.keys[document], str(meta["id"]), sentences, start, stop)


class _Rows:
    """Rows of a plan, read from its datasets. Safe to use from several threads."""

    def __init__(
        self,
        datasets: Sequence[Dataset],
        plan: Plan,
        max_segment: int,
        micro_batch_rows: int,
        open_shards: int,
        pinned: bool = False,
        skip_bad: bool = False,
    ) -> None:
        self.datasets, self.plan, self.max_segment = datasets, plan, max_segment
        dtype = torch.float32 if any(d.info.dtype in ("float32", "bfloat16") for d in datasets) else torch.float16
        self._buffers = Buffers((micro_batch_rows, plan.row_length, datasets[0].embed_dim), dtype, pinned)
        self._most = min(max(open_shards, FEWEST_OPEN), MOST_OPEN)
        # Futures, so that a thread that needs a shard waits for the one that is opening it, and for no other.
        self._open: OrderedDict[tuple[int, int, int], Future[ShardInOrder]] = OrderedDict()
        # The same shards by (source, shard): the next epoch of a small dataset finds them open.
        self._shards: WeakValueDictionary[tuple[int, int], Shard] = WeakValueDictionary()
        self._lock = Lock()
        self._skip_bad = skip_bad
        self._opened, self._bad = 0, set[tuple[int, int]]()

    def segments(self, step: int, lane: int) -> Iterator[Segment | Gap]:
        """The segments of one row, in order."""
        for piece in self.plan.pieces(step, lane):
            try:
                read = self._in_order(piece)
            except InputError as error:
                self._leave_out(piece, error)
                yield Gap(piece.stop - piece.start)
            else:
                yield from cut(read, piece.start, piece.stop, self.max_segment)

    def batch(self, places: Sequence[tuple[int, int]], step: int, index: int, first_lane: int) -> Batch:
        """The rows at `places`, each a step and a lane, as one batch."""
        concepts = self._buffers.take()
        segment_ids = torch.empty(concepts.shape[:2], dtype=torch.int32)
        missing = 0
        for place, row, ids in zip(places, concepts.numpy(), segment_ids.numpy(), strict=True):
            missing += fill_row(self.segments(*place), row, ids)
        return Batch(concepts, segment_ids, step, index, first_lane, missing)

    def _in_order(self, piece: Piece) -> ShardInOrder:
        """A shard in the order of an epoch; the one that nobody has used for longest is closed."""
        key = (piece.source, piece.epoch, piece.shard)
        with self._lock:
            future = self._open.get(key)
            if opener := future is None:
                future = self._open[key] = Future()
                if len(self._open) > self._most:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(key)
        assert future is not None
        if opener:
            try:
                shard = self._shard(piece.source, piece.shard)
                order = document_order(self.plan.seed, piece.epoch, piece.source, piece.shard, len(shard))
                future.set_result(ShardInOrder.of(shard, order))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def _shard(self, source: int, shard: int) -> Shard:
        with self._lock:
            found = self._shards.get((source, shard))
        if found is None:
            found = open_shard(self.datasets[source], shard, whole=True)
            with self._lock:
                self._shards[source, shard] = found
                self._opened += 1
        return found

    def _leave_out(self, piece: Piece, error: InputError) -> None:
        """Note a shard that cannot be read; raise the error where that is too much."""
        if not self._skip_bad:
            raise error
        with self._lock:
            if (piece.source, piece.shard) in self._bad:
                return
            self._bad.add((piece.source, piece.shard))
            bad, opened = len(self._bad), self._opened + len(self._bad)
        if bad > max(1, MOST_BAD * opened):
            raise InputError(
                [*error.mistakes, f"{bad} of {opened} shards could not be read: too many to leave out (on_bad_shard)"]
            ) from error
        for line in error.mistakes:
            logger.error("left out: %s", line)


class _Fetching:
    """Fetches the coming shards of lanes into the cache, where datasets have shards that are elsewhere."""

    def __init__(self, datasets: Sequence[Dataset], plan: Plan, lanes: range) -> None:
        self.datasets, self.plan = datasets, plan
        self._stopped = Event()
        self._coming: dict[int, list[int]] = {
            lane: [] for lane in lanes if datasets[plan.source_of(lane)].cache is not None
        }
        self._pool = ThreadPoolExecutor(FETCHED_AT_A_TIME, "lcm-ds-fetch") if self._coming else None

    def reach(self, step: int) -> None:
        """Ask for what the lanes read from `step` on."""
        if self._pool is None:
            return
        for lane, known in self._coming.items():
            self._coming[lane] = self.plan.coming(step, lane, FETCHED_AHEAD)
            for shard in self._coming[lane]:
                if shard not in known:
                    self._pool.submit(self._fetch, self.plan.source_of(lane), shard)

    def _fetch(self, source: int, shard: int) -> None:
        with suppress(InputError, Stopped):  # an error comes again where the shard is read
            self.datasets[source].fetch(shard, self._stopped)

    def close(self) -> None:
        """End the threads; what they are fetching is given up."""
        self._stopped.set()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
