"""The loader: the plan's rows as batches, read ahead by threads.

Promises the same global batches in the same order for any world size, micro-batch and number of threads: a batch is a
pure function of (step, index), so a resume needs nothing but the step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import count
from threading import Event
from typing import TypeVar

from lcm_ds.data.batch import Batch, BatchReader
from lcm_ds.data.format import Dataset
from lcm_ds.data.index.first_use import indexed
from lcm_ds.data.open_shards import VALIDATION_BLOCK, OpenShards, ShardPrefetcher, check_cache
from lcm_ds.data.plan import Plan
from lcm_ds.data.supervised import source_of
from lcm_ds.errors import InputError

T = TypeVar("T")

VALIDATION_SEED = 0
VALIDATION_PREFETCH = 2  # batches


class Loader:
    """The batches of one rank, in order; endless if the plan is.

    Of the rows of a step, rank r of W has a contiguous run of lanes, and its micro-batch i the i-th run of
    micro_batch_rows of those. An error in a thread is raised in place of its batch. What happens to a shard that cannot
    be read: see `OpenShards.skip`.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        plan: Plan,
        rank: int,
        world_size: int,
        micro_batch_rows: int,
        workers: int = 1,
        start_step: int = 0,
        pinned: bool = False,
        local_ranks: int = 1,
        skipped_steps: Sequence[range] = (),
    ) -> None:
        """Check the limits and start the threads.

        Args:
            datasets: Those of the plan.
            plan: The order of data.
            rank: Of this process.
            world_size: Number of ranks.
            micro_batch_rows: Rows of a batch.
            workers: Threads that read ahead, by as many batches as a step has for this rank, or by twice their number
                and two if that is more. With 0, reads happen on request.
            start_step: The first step.
            pinned: Whether batches lie in page-locked memory.
            local_ranks: Processes of this node, which share a cache: it has to hold two blocks of shards for each
                stream that they read, and two more shards per rank for validation.
            skipped_steps: Steps to pass over.

        Raises:
            InputError: rows_per_step does not divide, a cache is too small, or this process may open too few files.
        """
        if plan.rows_per_step % (world_size * micro_batch_rows):
            raise InputError(
                f"batch.rows_per_step: {plan.rows_per_step} is not a multiple of "
                f"{world_size} ranks × {micro_batch_rows} micro_batch_rows"
            )
        self.plan, self.micro_batch_rows = plan, micro_batch_rows
        self._start_step, self._skipped_steps = start_step, skipped_steps
        lanes = plan.rows_per_step // world_size
        self.lanes = range(rank * lanes, (rank + 1) * lanes)
        self.micro_batches = lanes // micro_batch_rows  # a step
        self._stopped = Event()
        check_cache(datasets, plan, self.lanes, local_ranks)
        shards = OpenShards(datasets, plan, self.lanes, self._stopped)
        self._reader = BatchReader(shards, plan, micro_batch_rows, pinned)
        self._ahead = max(2 * workers + 2, self.micro_batches)
        self._pool = ThreadPoolExecutor(workers, "lcm-ds-loader") if workers else None
        self._prefetcher = ShardPrefetcher(datasets, plan, self.lanes, self._stopped)

    def __iter__(self) -> Iterator[Batch]:
        return self.map(lambda batch: batch)

    def map(self, function: Callable[[Batch], T]) -> Iterator[T]:
        """The results of `function` for each batch, in order; it runs in the threads that read."""

        def read(step: int, index: int) -> T:
            return function(self.read(step, index))

        if self._pool is None:
            yield from (read(*position) for position in self._order())
            return
        yield from _read_ahead(self._pool, self._ahead, (partial(read, *position) for position in self._order()))

    def read(self, step: int, index: int) -> Batch:
        """Micro-batch `index` of `step`."""
        first_lane = self.lanes.start + index * self.micro_batch_rows
        return self._reader.read(step, range(first_lane, first_lane + self.micro_batch_rows), index, first_lane)

    def close(self) -> None:
        """End the threads and drop what they have read ahead.

        A thread that waits for a server's next byte ends after remote.READ_TIMEOUT at the latest.
        """
        self._stopped.set()
        self._prefetcher.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _order(self) -> Iterator[tuple[int, int]]:
        for step in count(self._start_step) if self.plan.steps is None else range(self._start_step, self.plan.steps):
            if any(step in steps for steps in self._skipped_steps):
                continue
            self._prefetcher.advance(step)
            yield from ((step, index) for index in range(self.micro_batches))


def _read_ahead(pool: ThreadPoolExecutor, ahead: int, reads: Iterator[Callable[[], T]]) -> Iterator[T]:
    """The results of `reads`, in order; threads of the pool are `ahead` batches ahead."""
    pending: deque[Future[T]] = deque()
    while True:
        for read in reads:
            pending.append(pool.submit(read))
            if len(pending) > ahead:
                break
        if not pending:
            return
        yield pending.popleft().result()


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
    """This rank's batches of a pass over a dataset, in an order that is always the same.

    Batch b of all, in the order of the rows, belongs to rank b mod world_size: the content of a batch does not depend
    on who reads it. All ranks have the same number of batches. No row comes twice: the last batches are padded with
    empty rows. A thread reads ahead.

    Args:
        dataset: What to read.
        row_length: Concepts of a row.
        max_segment: Concepts of a segment, at most.
        micro_batch_rows: Rows of a batch.
        rank: Of this process.
        world_size: Number of ranks.
        rows: How many rows all ranks read together; None for all of the dataset.
        origins: Whether batches have `origins`.

    Yields:
        The batches.

    Raises:
        InputError: A shard cannot be read and is not skipped (see `OpenShards.skip`).
    """
    dataset = indexed(dataset)
    source = source_of(dataset, row_length, max_segment, shuffle_shards=VALIDATION_BLOCK)
    plan = Plan([source], VALIDATION_SEED, micro_batch_rows, row_length, epochs=1)
    rows = plan.rows(0) if rows is None else min(rows, plan.rows(0))
    reader = BatchReader(OpenShards([dataset], plan, range(micro_batch_rows)), plan, micro_batch_rows)

    def read(index: int) -> Batch:
        step = index * world_size + rank
        lanes = range(max(0, min(micro_batch_rows, rows - step * micro_batch_rows)))
        return reader.read(step, lanes, index, step * micro_batch_rows, origins)

    batches = range(-(-rows // (world_size * micro_batch_rows)))
    pool = ThreadPoolExecutor(1, "lcm-ds-validation")
    try:
        yield from _read_ahead(pool, VALIDATION_PREFETCH, (partial(read, index) for index in batches))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
