"""The files of shards that a reader of a plan has open, those it skips, and those that are fetched ahead."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from random import Random
from threading import Event, Lock

from lcm_ds.data.format import Dataset
from lcm_ds.data.plan import Plan
from lcm_ds.data.remote.fetch import Stopped
from lcm_ds.errors import InputError, TransientError
from lcm_ds.files import OpenFile

logger = logging.getLogger(__name__)

MAX_OPEN = 64  # shards of local datasets
FETCH_THREADS = 8
VALIDATION_BLOCK = 8  # shards
MAX_BAD_SHARE = 0.05  # of the shards read so far: if more are bad, something else must be wrong
RETRY_SECONDS = 60.0  # until a shard whose server gave no answer is tried again


class OpenShards:
    """The files of a plan's datasets, opened when they are needed; if too many are open, one is closed.

    Of a remote dataset that is the least recently used, which is of an earlier block; of a local one any: each batch
    goes through the shards in order, so the least recently used would be the next that is needed. Safe to use from
    several threads.
    """

    def __init__(self, datasets: Sequence[Dataset], plan: Plan, lanes: range, stopped: Event | None = None) -> None:
        """Prepare to read; nothing is opened yet.

        Args:
            datasets: Those of the plan.
            plan: The order of data.
            lanes: Those that are read.
            stopped: When set, fetching is given up with `Stopped`.

        Raises:
            InputError: This process may not open so many files.
        """
        self.datasets, self._stopped = datasets, stopped
        # Files of each dataset. An open one is not evicted from the cache, which has room for two blocks of a stream.
        self._most = [
            2 * plan.streams(source, lanes) * plan.most_shards(source)
            if each.any_remote
            else max(1, MAX_OPEN // len(datasets))
            for source, each in enumerate(datasets)
        ]
        _allow_open_files(sum(self._most))
        self._open: list[dict[int, OpenFile | InputError]] = [{} for _ in datasets]  # or why it cannot be opened
        # A thread that needs a file waits only for the thread that is opening it.
        self._opening = dict[tuple[int, int], Future[OpenFile | InputError]]()
        self._random = Random(0)
        self._lock = Lock()
        self._tried = set[tuple[int, int]]()
        self._skipped: dict[tuple[int, int], InputError] = {}
        self._retry_at: dict[tuple[int, int], tuple[float, TransientError]] = {}  # and why not before

    def file(self, source: int, shard: int) -> OpenFile:
        """The file of a shard.

        Raises InputError if it cannot be read, TransientError if its server gives no answer.
        """
        files, key, by_age = self._open[source], (source, shard), self.datasets[source].any_remote
        with self._lock:
            if (known := files.get(shard)) is not None:
                if by_age:
                    files[shard] = files.pop(shard)
                return _file(known)
            future = self._opening.get(key)
            if opener := future is None:
                opening = sum(other == source for other, _ in self._opening)
                # A file is closed when nobody reads it any more.
                while files and len(files) + opening >= self._most[source]:
                    del files[next(iter(files)) if by_age else self._random.choice(list(files))]
                future = self._opening[key] = Future()
                self._tried.add(key)
        assert future is not None
        if not opener:
            return _file(future.result())
        opened: OpenFile | InputError
        try:
            opened = self._opened(source, shard)
        except InputError as error:
            opened = error
        except BaseException as error:
            with self._lock:
                del self._opening[key]
            future.set_exception(error)
            raise
        with self._lock:
            del self._opening[key]
            if not isinstance(opened, TransientError):
                files[shard] = opened
        future.set_result(opened)
        return _file(opened)

    def changed(self, source: int, shard: int, file: OpenFile) -> bool:
        """Close a file whose bytes are not the listed ones; whether it is a copy, which may be fetched again."""
        with self._lock:
            if self._open[source].get(shard) is file:
                del self._open[source][shard]
        dataset = self.datasets[source]
        if not dataset.is_remote(shard):
            return False
        assert dataset.cache is not None
        dataset.cache.invalidate(file)
        return True

    def note_tried(self, source: int, shard: int) -> None:
        """Count a shard among those that `skip` compares the bad ones with; `file` does so itself."""
        with self._lock:
            self._tried.add((source, shard))

    def skip(self, source: int, shard: int, error: InputError) -> None:
        """Log that documents of a shard are skipped, once.

        Raises `error` if the dataset does not skip what is bad, or if more than one and more than MAX_BAD_SHARE of the
        shards that were read are bad.
        """
        if not self.datasets[source].skip_bad:
            raise error
        key = (source, shard)
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

    def _opened(self, source: int, shard: int) -> OpenFile:
        key = (source, shard)
        retry_at, failure = self._retry_at.get(key, (0.0, None))
        if failure is not None and time.monotonic() < retry_at:
            raise failure
        try:
            file = self.datasets[source].open_file(shard, self._stopped)
        except TransientError as error:
            self._retry_at[key] = time.monotonic() + RETRY_SECONDS, error
            raise
        if failure is not None:
            with self._lock:
                self._retry_at.pop(key, None)
                self._skipped.pop(key, None)
        return file


def _file(opened: OpenFile | InputError) -> OpenFile:
    """What was opened; raises the reason why it could not be."""
    if isinstance(opened, InputError):
        raise type(opened)(opened.errors)  # another one each time: it keeps the frames that it passes
    return opened


def check_cache(datasets: Sequence[Dataset], plan: Plan, lanes: range, local_ranks: int) -> None:
    """Check that the caches of remote datasets hold two blocks of each stream that a node reads, and of validation.

    Args:
        datasets: Those of the plan.
        plan: The order of data.
        lanes: Those of a rank.
        local_ranks: Ranks of a node, which share a cache.

    Raises:
        InputError: A cache is too small.
    """
    for source, dataset in enumerate(datasets):
        if dataset.any_remote and dataset.cache is not None:
            streams = min(local_ranks * plan.streams(source, lanes), plan.streams(source, range(plan.rows_per_step)))
            largest = max(shard.bytes for shard in dataset.shards)
            dataset.cache.check_room(2 * (streams * plan.most_shards(source) + VALIDATION_BLOCK), largest)


def _allow_open_files(most: int) -> None:
    """Raise the limit of files that this process may open, as far as it can be.

    Raises InputError if twice `most` are too many: the process has other files, too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = max(soft, 2 * most)
    if soft < 2 * most and soft < hard:
        soft = min(2 * most, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    if soft < 2 * most:
        raise InputError(
            f"ulimit -n: this process may open {soft} files; it has up to {most} shards open at a time, and other "
            f"files: at least {2 * most}"
        )


class ShardPrefetcher:
    """Fetches the shards of remote datasets before they are read: those of the block that is read, then the next one's.

    It also has the next blocks laid out.
    """

    def __init__(self, datasets: Sequence[Dataset], plan: Plan, lanes: range, stopped: Event) -> None:
        self.datasets, self.plan, self.lanes, self._stopped = datasets, plan, lanes, stopped
        remote = any(dataset.any_remote for dataset in datasets)
        self._pool = ThreadPoolExecutor(1 + FETCH_THREADS * remote, "lcm-ds-prefetch")
        self._blocks: list[object] = []
        self._wanted: dict[tuple[int, int], bool] = {}  # (source, shard) → whether it is requested or fetched

    def advance(self, step: int) -> None:
        """Request what the lanes read from `step` on."""
        blocks = self.plan.blocks(step, self.lanes)
        if blocks != self._blocks:
            for block in blocks:
                if block not in self._blocks:
                    self._pool.submit(self.plan.lay_out, block)  # an error comes again when it is read
            self._blocks = list(blocks)
            shards = [
                (source, shard)
                for source, shards in map(self.plan.shards, blocks)
                if self.datasets[source].any_remote
                for shard in shards.tolist()
            ]
            self._wanted = {key: self._wanted.get(key, False) for key in shards}
        for key, requested in list(self._wanted.items()):
            if not requested:
                self._wanted[key] = True
                self._pool.submit(self._fetch, key)

    def _fetch(self, key: tuple[int, int]) -> None:
        source, shard = key
        with suppress(InputError, Stopped):  # an error comes again when the shard is read
            if key not in self._wanted or self._stopped.is_set():  # the lanes are past it
                return
            if self.datasets[source].open_file_ahead(shard, self._stopped) is None:
                self._wanted[key] = False  # to be tried again

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
