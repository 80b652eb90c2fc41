"""Atomic writes, checksums, and reading files, also in parts; what file systems of clusters and buckets lack."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from lcm_ds.errors import InputError

logger = logging.getLogger("lcm_ds")

# A file system that lacks an operation answers with one of these: Lustre without -o flock ENOSYS, NFS ENOLCK or EBADF,
# SMB and FUSE EINVAL or ENOTSUP.
_UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EBADF, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_warned: set[str] = set()


def _warn_once(kind: str, text: str) -> None:
    if kind not in _warned:
        _warned.add(kind)
        logger.warning(text)


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file through `NAME.partial`, synced and renamed: a reader sees the old content or the new."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)


def output_file_error(option: str, path: str) -> str | None:
    """Why the file of an option cannot be written; None if no reason is known beforehand."""
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        return f"{option}: {path}: has to be a file in a folder that is there"
    return None


def write_named(option: str, path: str, data: str | bytes) -> None:
    """Write the file of an option atomically. Raises InputError if it cannot be written."""
    try:
        write_whole(Path(path), data)
    except OSError as error:
        raise InputError(f"{option}: {path}: cannot be written: {error.strerror}") from None


def json_object(text: str | bytes, path: str | Path) -> dict[str, Any]:
    """The JSON object in the text of the file at `path`. Raises InputError if it is not one."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: has to be a JSON object")
    return value


def read_object(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in a file; `default` if there is none. Raises InputError without a default."""
    try:
        return json_object(path.read_bytes(), path)
    except (OSError, InputError) as error:
        if default is not None:
            return default
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def why_not_writable(folder: str | Path) -> str | None:
    """Why a folder cannot be made or written into, found by trying; None if it can.

    Permissions alone do not tell: root may write everywhere, but not on a read-only file system.
    """
    there = Path(folder).absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        return f"{folder}: {there} is a file, not a folder"
    try:
        with tempfile.TemporaryDirectory(prefix=".lcm-ds-", dir=there) as trial:
            Path(trial, "file").touch()
    except OSError as error:
        return f"{folder}: {there} cannot be written to: {error.strerror}"
    return None


def check_new(output: str | Path) -> None:
    """Raise InputError if `output` is a file, or a folder that is not empty."""
    output = Path(output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise InputError(f"{output}: is there already; choose a new folder")


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A folder to fill, which becomes `output` only when everything in it is written.

    Raises InputError if `output` exists already or cannot be written.
    """
    check_new(output)
    output = Path(output)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        mode = stat.S_IMODE(partial.stat().st_mode) & 0o666  # as the umask has it; safetensors writes 0600
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(mode)
            sync(path)
        os.replace(partial, output)
        sync(output.parent)
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's names, survive a power cut.

    Not every file system can do the latter (SMB, some FUSE): a warning, once, as nothing else is wrong there.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED or not path.is_dir():
            raise
        _warn_once(
            "sync", f"{path}: its file system cannot sync folders ({error.strerror}): a power cut may undo renames"
        )
    finally:
        os.close(descriptor)


def lock(descriptor: int, operation: int, path: str | Path) -> bool:
    """Lock an open file as fcntl.flock does, if its file system has locks; else there is a warning, once.

    Args:
        descriptor: The file's.
        operation: fcntl.LOCK_EX or LOCK_SH, also with LOCK_NB.
        path: The file, for the warning.

    Returns:
        Whether it is locked.

    Raises:
        BlockingIOError: with LOCK_NB, if another process has locked it.
    """
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _warn_once("lock", f"{path}: cannot be locked ({error.strerror}): make sure that nothing else writes there")
        return False
    return True


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to a file, or a copy of it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def why_no_checkpoints(folder: Path) -> str | None:
    """Why a folder's file system cannot hold checkpoints, found by trying what they need; None if it can.

    The folder is made if it does not exist. Buckets that are mounted often cannot rename folders.
    """
    trial = folder / f"trial-{os.getpid()}"
    renamed = trial.with_name(trial.name + ".renamed")
    needs = "make folders"
    try:
        trial.mkdir(parents=True)
        needs = "replace files"
        for text in ("first", "second"):
            write_whole(trial / "file", text)
        needs = "rename folders"
        os.rename(trial, renamed)
        needs = "show a renamed folder's files"
        if (renamed / "file").read_text(encoding="utf-8") != "second":
            raise OSError(errno.EIO, "another content")
        needs = "delete folders"
        shutil.rmtree(renamed)
    except OSError as error:
        return f"its file system cannot {needs} ({error.strerror}), which checkpoints need: use a folder on another one"
    finally:
        for path in (trial, renamed):
            shutil.rmtree(path, ignore_errors=True)
    return None


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    return OpenFile(path).sha256()


NOWAIT = getattr(os, "RWF_NOWAIT", 0)  # Linux: an error instead of a wait for the disk


class OpenFile:
    """A file to read parts of, from any thread: `file[start:stop]` gives bytes, fewer if it ends sooner.

    Plain reads instead of a memory map: they are twice as fast for a file that is read once (no page faults), and a
    file that shrinks or a disk that fails is an error, not the end of the process. The file is opened again if its
    handle is stale, as on NFS after it was replaced or the server was restarted. Raises OSError.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # open as long as this object lives
        status = self.status()
        self._size = status.st_size
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # os may be gone when the process ends
        if hasattr(self, "descriptor"):
            close(self.descriptor)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an open file cannot be copied: its descriptor would be closed twice")

    @property
    def path(self) -> Path:
        """Where it is."""
        return Path(self._path)

    def __len__(self) -> int:
        """Bytes, when it was opened."""
        return self._size

    def status(self) -> os.stat_result:
        """The file's current status."""
        return os.fstat(self.descriptor)

    def sha256(self) -> str:
        """The sha256 of all its bytes, in hexadecimal."""
        digest, at = hashlib.sha256(), 0
        while piece := self[at : at + (1 << 20)]:
            digest.update(piece)
            at += len(piece)
        return digest.hexdigest()

    def __getitem__(self, part: slice) -> bytes:
        try:
            return os.pread(self.descriptor, part.stop - part.start, part.start)
        except OSError as error:
            self._open_again(error)
            return os.pread(self.descriptor, part.stop - part.start, part.start)

    def read_into(self, out: memoryview, offset: int) -> bool:
        """Fill `out`, plain bytes, with those from `offset` on; False if the file ends sooner."""
        done = self._preadv(out, offset)
        while done < len(out):  # rare: a read may return less than requested
            if (count := self._preadv(out[done:], offset + done)) == 0:
                return False
            done += count
        return True

    def read_cached(self, out: memoryview, offset: int) -> bool:
        """Fill `out` like `read_into`, but only with what the kernel has in memory: no wait for a disk or a server.

        Returns whether all of `out` was filled; False on a file system that cannot tell.
        """
        try:
            return os.preadv(self.descriptor, (out,), offset, NOWAIT) == len(out)
        except OSError:
            return False

    def fetch(self, offset: int, size: int) -> None:
        """Have the kernel fetch these bytes, without waiting for them."""
        with suppress(OSError):
            os.posix_fadvise(self.descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def _preadv(self, out: memoryview, offset: int) -> int:
        try:
            return os.preadv(self.descriptor, (out,), offset)
        except OSError as error:
            self._open_again(error)
            return os.preadv(self.descriptor, (out,), offset)

    def _open_again(self, error: OSError) -> None:
        """Put the file that is at the path now behind the same descriptor, if the error is that its handle is stale.

        Raises OSError if it is another error, or the file has another size.
        """
        if error.errno != errno.ESTALE:
            raise error
        new = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(new).st_size != self._size:
                raise OSError(errno.ESTALE, "has been replaced by a file of another size", str(self.path))
            os.dup2(new, self.descriptor, inheritable=False)
        finally:
            os.close(new)
        _warn_once("stale", f"{self.path}: was opened again: the file server had dropped it (stale file handle)")
