"""The shards that a reader of a plan has open or skips, and those that are prepared before they are read."""

from __future__ import annotations

import logging
import resource
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Event, Lock
from weakref import WeakValueDictionary

from lcm_ds.data.format import Dataset
from lcm_ds.data.plan import Piece, Plan, document_order
from lcm_ds.data.remote.fetch import Stopped
from lcm_ds.data.rows import Segment, ShuffledShard, iter_segments
from lcm_ds.data.shard import Shard, open_shard, prefetch
from lcm_ds.data.supervised import longest_segment
from lcm_ds.errors import InputError, TransientError

logger = logging.getLogger(__name__)

MIN_OPEN = 32  # shards of local datasets that may be open at a time
MIN_CACHED = 2  # shards open at a time for a reader of one row after the other; each takes room in the cache
PREFETCHED_PER_LANE = 2  # shards, the one that the lane is in included
FETCH_THREADS = 8
MAX_BAD_SHARE = 0.05  # of the shards opened so far: if more are bad, something else must be wrong
RETRY_SECONDS = 60.0  # until a shard whose server gave no answer is tried again


class OpenShards:
    """The shards of a plan's datasets, opened when they are needed; the least recently used is closed first.

    Safe to use from several threads.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        plan: Plan,
        max_segment: int,
        least: int,
        most: int,
        stopped: Event | None = None,
    ) -> None:
        """Prepare to read; nothing is opened yet.

        Args:
            datasets: Those of the plan.
            plan: The order of data.
            max_segment: Concepts of a segment, at most.
            least: Shards that have to be open at a time; as many are, if a dataset is remote.
            most: Shards that may be open at a time.
            stopped: When set, fetching is given up with `Stopped`.

        Raises:
            InputError: This process may not open `least` files.
        """
        self.datasets, self.plan, self._stopped = datasets, plan, stopped
        self._longest = [longest_segment(dataset, plan.row_length, max_segment) for dataset in datasets]
        # Otherwise rows would cut supervised documents: targets without a source, unnoticed.
        assert all(plan.packs(i) == (each.info.supervised is not None) for i, each in enumerate(datasets)), "source_of"
        remote = any(dataset.any_remote for dataset in datasets)
        self._most = _allow_open_files(least, least if remote else max(most, MIN_OPEN))
        # Futures, so that a thread that needs a shard waits only for the thread that is opening it.
        self._open: OrderedDict[tuple[int, int, int], Future[ShuffledShard]] = OrderedDict()
        # The same shards by (source, shard): the next epoch of a small dataset finds them open.
        self._shards: WeakValueDictionary[tuple[int, int], Shard] = WeakValueDictionary()
        self._lock = Lock()
        self._tried = set[tuple[int, int]]()
        self._skipped: dict[tuple[int, int], InputError] = {}
        self._retry_at: dict[tuple[int, int], tuple[float, TransientError]] = {}  # and why not before

    def segments(self, piece: Piece) -> Iterator[Segment]:
        """The segments of a piece, in order. Raises InputError, TransientError if the server gives no answer."""
        return iter_segments(self._shuffled(piece), piece.start, piece.stop, self._longest[piece.source])

    def skip(self, piece: Piece, error: InputError) -> None:
        """Log that the shard of a piece is skipped, once.

        Raises `error` if the dataset does not skip bad shards, or if more than one and more than MAX_BAD_SHARE of the
        shards opened are bad.
        """
        if not self.datasets[piece.source].skip_bad:
            raise error
        key = (piece.source, piece.shard)
        with self._lock:
            before, self._skipped[key] = self._skipped.get(key), error
            bad, tried = len(self._skipped), len(self._tried)
        if before is not None and isinstance(before, TransientError) == isinstance(error, TransientError):
            return
        if bad > max(1, MAX_BAD_SHARE * tried):
            raise type(error)(
                [*error.errors, f"{bad} of {tried} shards could not be read: too many to skip (on_bad_shard)"]
            ) from error
        for line in error.errors:
            logger.error("skipped for now: %s" if isinstance(error, TransientError) else "skipped: %s", line)

    def _shuffled(self, piece: Piece) -> ShuffledShard:
        """The shard of a piece in the order of its epoch, opened if it is not; another one is closed for it."""
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
        """Close the least recently used shard that is not being opened."""
        oldest = next((key for key, future in self._open.items() if future.done()), None)
        if oldest is not None:
            del self._open[oldest]

    def _shard(self, source: int, index: int) -> Shard:
        key = (source, index)
        with self._lock:
            shard = self._shards.get(key)
            self._tried.add(key)
            retry_at, failure = self._retry_at.get(key, (0.0, None))
        if failure is not None and time.monotonic() < retry_at:
            raise failure
        if shard is None:
            try:
                shard = open_shard(self.datasets[source], index, self._stopped)
            except TransientError as error:
                self._retry_at[key] = time.monotonic() + RETRY_SECONDS, error
                raise
            with self._lock:
                self._shards[key] = shard
                if self._retry_at.pop(key, None):
                    self._skipped.pop(key, None)
        return shard


def _allow_open_files(least: int, most: int) -> int:
    """The number of shards this process may have open, of `most` wanted: half of the files that it may open.

    The soft limit is raised as far as it can be. Raises InputError if fewer than `least` may be open.
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
    """Prepares the coming shards of lanes: fetches them if they are remote, and compares their checksums."""

    def __init__(self, datasets: Sequence[Dataset], plan: Plan, lanes: range, workers: int, stopped: Event) -> None:
        self.datasets, self.plan, self._stopped = datasets, plan, stopped
        remote = any(dataset.any_remote for dataset in datasets)
        self._pool = ThreadPoolExecutor(max(1, workers, FETCH_THREADS * remote), "lcm-ds-prefetch")
        self._upcoming: dict[int, list[int]] = {lane: [] for lane in lanes}  # shards of each lane
        self._failed: set[tuple[int, int]] = set()  # (lane, shard): to try again

    def advance(self, step: int) -> None:
        """Request what the lanes read from `step` on."""
        for lane, requested in self._upcoming.items():
            self._upcoming[lane] = upcoming = self.plan.upcoming_shards(step, lane, PREFETCHED_PER_LANE)
            for shard in upcoming:
                if shard not in requested or (lane, shard) in self._failed:
                    self._failed.discard((lane, shard))
                    self._pool.submit(self._prefetch, lane, shard)

    def _prefetch(self, lane: int, shard: int) -> None:
        with suppress(InputError, Stopped):  # an error comes again when the shard is read
            if shard not in self._upcoming[lane] or self._stopped.is_set():  # the lane is past it
                return
            if not prefetch(self.datasets[self.plan.source_of(lane)], shard, self._stopped):
                self._failed.add((lane, shard))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
