"""Shards that are elsewhere, kept in a folder by their checksum: one copy for all processes of a node.

A file has the name of its sha256 and was compared with it before it got that name, so it is never half a shard. Who
fetches one holds a lock on its `.partial`, the others wait for that; who opens one holds a lock on it, so that it is
not taken out meanwhile. A kill frees the locks. A shard that was opened stays readable when its file is taken out.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import BinaryIO

from lcm_ds.data import remote
from lcm_ds.errors import InputError
from lcm_ds.files import sync_folder

logger = logging.getLogger(__name__)

FREE_SHARE = 0.1  # of the disk, left free where there is no limit
_LOCK = "lock"
_PAUSE = 0.1  # seconds between two looks for room


@dataclass(frozen=True)
class Cache:
    """Shards in `folder`, those of least recent use taken out to stay within `limit` bytes.

    limit: None takes what the disk has, less a tenth of it. The folder has to be on a disk of the node's own.
    """

    folder: str
    limit: int | None = None

    @classmethod
    def of(cls, cache_dir: str | Path | None, cache_gb: float | None = None) -> Cache | None:
        """What a config's `data` block says; None where it names no folder. cache_gb: limit in 10⁹ bytes."""
        if cache_dir is None:
            return None
        return cls(str(cache_dir), None if cache_gb is None else int(cache_gb * 1e9))

    @contextmanager
    def holding(self, url: str, sha256: str, size: int) -> Iterator[Path]:
        """The file of the shard at `url`, fetched if it is not here; it stays at least as long as the context.

        sha256, size (bytes): what shards.jsonl lists. Raises InputError where it cannot be had, came as something else,
        or there is no room; Unavailable where its server gives no answer.
        """
        target = Path(self.folder) / f"{sha256}.tar"
        while (file := _held(target, size)) is None:
            self._bring(url, target, sha256, size)
        with file:
            os.utime(file.fileno())  # the time of its last use
            yield target

    def fetch(self, url: str, sha256: str, size: int, stopped: Event) -> None:
        """Fetch a shard that will be wanted, unless it is here or coming, or there is no room now.

        stopped: when set, it is given up.
        """
        if not (Path(self.folder) / f"{sha256}.tar").exists():
            self._bring(url, Path(self.folder) / f"{sha256}.tar", sha256, size, stopped)

    def forget(self, sha256: str) -> None:
        """Take a shard out whose bytes have changed since it came."""
        logger.warning("%s: its bytes have changed since it was fetched; it is fetched again", sha256)
        with self._alone():
            (Path(self.folder) / f"{sha256}.tar").unlink(missing_ok=True)

    def _bring(self, url: str, target: Path, sha256: str, size: int, stopped: Event | None = None) -> None:
        """Fetch a shard, or wait until another process has; `stopped`: given where nobody needs it yet."""
        partial = target.with_name(f"{sha256}.{size}.partial")
        with self._alone():
            if target.exists():
                return
            file = partial.open("ab")
            ours = _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            room = False
            try:
                room = ours and self._make_room(size)
            finally:
                if ours and not room:
                    partial.unlink()
                    file.close()
        if ours and room:
            with file:
                self._fill(url, partial, target, sha256, size, stopped)
        elif stopped is not None:
            file.close()
        elif ours:
            time.sleep(_PAUSE)
        else:
            with file:
                _lock(file, fcntl.LOCK_SH)  # granted when whoever fetches it is done, or dead

    def _fill(self, url: str, partial: Path, target: Path, sha256: str, size: int, stopped: Event | None) -> None:
        try:
            remote.copy(url, partial, sha256, size, stopped)
        except BaseException:
            with self._alone():
                partial.unlink(missing_ok=True)
            raise
        with self._alone():
            os.replace(partial, target)
        sync_folder(target.parent)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process or thread changes the folder meanwhile."""
        try:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            file = (Path(self.folder) / _LOCK).open("ab")
        except OSError as error:
            raise InputError(f"data.cache_dir: {self.folder}: cannot be used: {error.strerror}") from None
        with file:
            _lock(file, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int) -> bool:
        """Take out what was not used for longest, until `size` more bytes (of a partial that is there) fit.

        False where that has to wait for other processes. Raises InputError where it is no matter of waiting.
        """
        kept: list[tuple[int, int, str]] = []
        coming = written = others = 0
        for entry in os.scandir(self.folder):
            if entry.name.endswith(".tar"):
                kept.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
            elif entry.name.endswith(".partial") and not _remove(entry.path):
                coming += int(entry.name.split(".")[1])
                written += entry.stat().st_size
                others += 1
        others -= 1
        disk = shutil.disk_usage(self.folder)
        if self.limit is not None:
            over = sum(held for _, held, _ in kept) + coming - self.limit
            needed = over
        else:
            over = coming - written + int(FREE_SHARE * disk.total) - disk.free
            needed = coming - written - disk.free
        in_use = False
        for _, held, path in sorted(kept):
            if over <= 0:
                break
            if _remove(path):
                over, needed = over - held, needed - held
            else:
                in_use = True
        if needed > 0 and not (in_use or others):
            have = f"data.cache_gb is {self.limit / 1e9:g}" if self.limit is not None else f"{disk.free:,} bytes free"
            raise InputError(f"data.cache_dir: {self.folder}: no room for a shard of {size:,} bytes: {have}")
        return needed <= 0


def _remove(path: str) -> bool:
    """Remove a file that nobody has locked."""
    with open(path, "rb") as file:
        if not _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
        os.unlink(path)
    return True


def _held(target: Path, size: int) -> BinaryIO | None:
    """The file, open and locked against its removal; None where it is not there."""
    try:
        file = target.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return None
    _lock(file, fcntl.LOCK_SH)
    found = os.fstat(file.fileno())
    if found.st_nlink and found.st_size == size:
        return file
    with file:
        if found.st_nlink:
            target.unlink(missing_ok=True)
    return None


def _lock(file: BinaryIO, how: int) -> bool:
    """Lock a file (see fcntl.flock); False where it is locked and `how` does not wait."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    return True
