"""A cache of remote shards in a folder, named by their checksum: one copy for all processes of a node.

A file is compared with its sha256 before it gets that name, so it is always a complete shard. The process that fetches
a shard holds a lock on its `.partial`, and the others wait for it. A process that has a shard open holds a lock on it,
and it is not evicted: its room would not be freed. A kill releases the locks. A file's mtime is when it was fetched,
its atime when it was last used; until its first use, the atime is in the future, by the time it is kept for that.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Event
from typing import BinaryIO

from lcm_ds.data.remote import fetch as remote
from lcm_ds.errors import InputError
from lcm_ds.files import OpenFile, sync

logger = logging.getLogger(__name__)

FREE_SHARE = 0.1  # of the disk, left free if there is no limit
PATIENCE = 600.0  # seconds that a shard waits for room before that is an error
_LOCK = "lock"
_TO_BE_USED = 7 * 86_400 * 10**9  # ns that a prefetched shard is kept in preference to used ones
_PAUSE = 0.1  # seconds between two checks for room or for another process's fetch
# The cache's own files; others in the folder stay untouched.
_CACHED = re.compile(r"[0-9a-f]{64}\.tar")
_PARTIAL = re.compile(r"[0-9a-f]{64}\.(\d+)\.partial")


@dataclass(frozen=True)
class Cache:
    """Shards in `folder`, the least recently used evicted to stay within `limit` bytes.

    limit: None uses the disk but for a tenth of it. The folder has to be on a local disk of the node.
    """

    folder: str
    limit: int | None = None

    @classmethod
    def of(cls, cache_dir: str | Path | None, cache_gb: float | None = None) -> Cache | None:
        """The cache of a config's `data` block; None if it names no folder. cache_gb: limit in 10⁹ bytes."""
        if cache_dir is None:
            return None
        return cls(str(cache_dir), None if cache_gb is None else int(cache_gb * 1e9))

    def open(self, url: str, sha256: str, size: int, stopped: Event | None = None) -> OpenFile:
        """The shard at `url`, fetched if it is not cached; it is not evicted as long as it is open.

        Args:
            url: Of the shard.
            sha256: As listed in shards.jsonl.
            size: Bytes, as listed there.
            stopped: When set, the fetch is given up with `Stopped`.

        Returns:
            The open file.

        Raises:
            InputError: It cannot be fetched, has another checksum, or there is no room.
            TransientError: Its server gives no answer.
        """
        target = self._place(sha256)
        full, since = False, time.monotonic()
        while (file := self._open_cached(target, size)) is None:
            try:
                waits = not self._fetch(url, target, sha256, size, stopped, full=full)
                full = False
            except remote.NoSpace:  # because others write to the disk, too
                full = True
                continue
            if not waits:
                since = time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                raise self._no_room(size, f"what is there has been in use for {PATIENCE / 60:g} minutes")
            else:
                _pause(stopped)
        with suppress(OSError):  # a file of another user keeps the time of its last read
            os.utime(file.descriptor, ns=(time.time_ns(), file.status().st_mtime_ns))
        return file

    def open_ahead(self, url: str, sha256: str, size: int, stopped: Event) -> OpenFile | None:
        """As `open`, for a shard needed later; None if there is no room now, or another process is fetching it."""
        target = self._place(sha256)
        file = self._open_cached(target, size)
        if file is None:
            with suppress(remote.NoSpace):
                self._fetch(url, target, sha256, size, stopped, ahead=True)
            file = self._open_cached(target, size)
        return file

    def invalidate(self, file: OpenFile) -> None:
        """Evict a shard whose bytes have changed since it was fetched."""
        logger.warning("%s: its bytes have changed since it was fetched; it is fetched again", file.path)
        self._evict(file)

    def check_room(self, shards: int, largest: int) -> None:
        """Raise InputError if the limit is too small for `shards` shards of up to `largest` bytes."""
        least = shards * largest
        if self.limit is not None and self.limit < least:
            raise InputError(
                f"data.cache_gb: {self.limit / 1e9:g} is too little: a node has {shards} shards of up to {largest:,} "
                "bytes open at a time (two blocks of data.shuffle_shards for each of data.streams, and of validation): "
                f"at least {least / 1e9:.4g}"
            )

    def _place(self, sha256: str) -> Path:
        return Path(self.folder) / f"{sha256}.tar"

    def _open_cached(self, target: Path, size: int) -> OpenFile | None:
        """The file, open and locked against eviction; None if it does not exist."""
        try:
            file = OpenFile(target)
            fcntl.flock(file.descriptor, fcntl.LOCK_SH)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise InputError(f"data.cache_dir: {target}: cannot be read: {error.strerror}") from None
        if not file.status().st_nlink:
            return None
        if len(file) != size:
            self._evict(file)
            return None
        return file

    def _evict(self, file: OpenFile) -> None:
        """Remove a file, unless it has been replaced since it was opened."""
        seen = file.status()
        with self._exclusive(), suppress(FileNotFoundError):
            there = os.stat(file.path)
            if (there.st_ino, there.st_mtime_ns) == (seen.st_ino, seen.st_mtime_ns):
                os.unlink(file.path)

    def _fetch(
        self,
        url: str,
        target: Path,
        sha256: str,
        size: int,
        stopped: Event | None,
        ahead: bool = False,
        full: bool = False,
    ) -> bool:
        """Fetch a shard, or wait until another process has; False if there is no room now.

        ahead, full: as for `_make_room`; with ahead it waits for no other process. Raises as remote.copy.
        """
        partial = target.with_name(f"{sha256}.{size}.partial")
        with self._exclusive():
            if target.exists():
                return True
            file = partial.open("ab")
            ours, room = _lock(file, fcntl.LOCK_EX), False
            try:
                room = ours and self._make_room(partial, size, ahead, full)
            finally:
                if ours and not room:
                    partial.unlink()
                    file.close()
        if ours and not room:
            return False
        with file:
            if ours:
                self._fill(url, partial, target, sha256, size, stopped)
            elif not ahead:
                while not _lock(file, fcntl.LOCK_SH):  # until the process that fetches it is done or dead
                    _pause(stopped)
        return True

    def _fill(self, url: str, partial: Path, target: Path, sha256: str, size: int, stopped: Event | None) -> None:
        try:
            remote.copy(url, partial, sha256, size, stopped)
            now = time.time_ns()
            os.utime(partial, ns=(now + _TO_BE_USED, now))
        except BaseException:
            with self._exclusive():
                partial.unlink(missing_ok=True)
            raise
        with self._exclusive():
            os.replace(partial, target)
            sync(target.parent)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Lock the folder against other processes and threads. Raises InputError if it cannot be used."""
        try:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            with (Path(self.folder) / _LOCK).open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise InputError(f"data.cache_dir: {self.folder}: cannot be used: {error.strerror}") from None

    def _make_room(self, own: Path, size: int, ahead: bool, full: bool) -> bool:
        """Evict the least recently used shards until `size` more bytes (of the partial `own`) fit.

        Shards not used yet are evicted last, never for a shard fetched `ahead`, and not to keep a tenth of the disk
        free. full: the disk has no room, whatever it reports. False if room may come. Raises InputError if it will not.
        """
        cached: list[tuple[int, int, str]] = []  # last use, size, path
        now = time.time_ns()
        incoming, written, others = size, 0, 0
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):  # removed meanwhile
                if _CACHED.fullmatch(entry.name):
                    cached.append((entry.stat().st_atime_ns, entry.stat().st_size, entry.path))
                elif (partial := _PARTIAL.fullmatch(entry.name)) and entry.name != own.name and not _remove(entry.path):
                    incoming += int(partial[1])
                    written += entry.stat().st_size
                    others += 1
        disk = shutil.disk_usage(self.folder)
        needed = incoming - written - (0 if full else disk.free)
        wanted = needed + int(FREE_SHARE * disk.total)
        if self.limit is not None:
            needed = wanted = max(needed, sum(bytes_ for _, bytes_, _ in cached) + incoming - self.limit)
        in_use = False
        for last_use, bytes_, path in sorted(cached):
            unused = last_use > now
            if (needed if unused else wanted) <= 0 or (unused and ahead):
                break
            if _remove(path):
                needed, wanted = needed - bytes_, wanted - bytes_
            else:
                in_use = True
        if needed > 0 and not (ahead or in_use or others):
            free = 0 if full else disk.free
            have = f"data.cache_gb is {self.limit / 1e9:g}, " if self.limit is not None else ""
            raise self._no_room(size, f"{have}{free:,} bytes are free")
        if wanted > 0 >= needed:
            _warn_of_a_full_disk(self.folder)
        return needed <= 0

    def _no_room(self, size: int, why: str) -> InputError:
        return InputError(f"data.cache_dir: {self.folder}: no room for a shard of {size:,} bytes: {why}")


@cache
def _warn_of_a_full_disk(folder: str) -> None:
    """Once a process."""
    logger.warning(
        "%s: its disk is fuller than %.0f %%: shards are kept only until they have been read",
        folder,
        100 * (1 - FREE_SHARE),
    )


def _remove(path: str) -> bool:
    """Remove a file; False if it is locked or may not be removed."""
    try:
        # NFS gives an exclusive lock only on a file that is open for writing (EBADF).
        with open(path, "r+b" if os.access(path, os.W_OK) else "rb") as file:
            if not _lock(file, fcntl.LOCK_EX):
                return False
            os.unlink(path)
    except PermissionError:
        return False
    return True


def _lock(file: BinaryIO, how: int) -> bool:
    """Lock a file (see fcntl.flock) without waiting; False if it is locked."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _pause(stopped: Event | None) -> None:
    if (stopped or Event()).wait(_PAUSE):
        raise remote.Stopped
