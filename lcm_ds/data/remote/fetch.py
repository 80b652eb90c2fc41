"""Remote files, read, copied and written through fsspec.

Transient errors (a dropped connection, 429, 5xx, an incomplete body) are retried with pauses that double; permanent
ones (403, 404, no credentials, an unknown protocol) are raised at once.
"""

from __future__ import annotations

import errno
import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

from fsspec.callbacks import Callback
from fsspec.core import url_to_fs

from lcm_ds.errors import InputError, TransientError
from lcm_ds.files import sha256_of

logger = logging.getLogger(__name__)

# The pauses add up to about a minute, or two if the server is slow to answer.
ATTEMPTS, FIRST_PAUSE, LONGEST_PAUSE = 8, 0.5, 16.0  # seconds
DAMAGED_ATTEMPTS = 3  # for a complete response with other content
CONNECT_TIMEOUT, READ_TIMEOUT = 15, 30  # seconds without an answer, or without a byte more

_TRANSIENT_STATUS = (408, 425, 429)  # and all from 500 on
# None of these is transient, not even those that are OSErrors.
_PERMANENT = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
    ValueError,
    TypeError,
    NotImplementedError,
    RecursionError,
)
_PERMANENT_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")  # of botocore
_FULL_ERRNO = (errno.ENOSPC, errno.EDQUOT)
_PERMANENT_ERRNO = (*_FULL_ERRNO, errno.EROFS, errno.EFBIG)

_OBJECT_STORES = {"s3", "gs", "gcs", "abfs", "az", "oss"}

Result = TypeVar("Result")


class Damaged(Exception):
    """The content is not what shards.jsonl lists."""


class Stopped(Exception):
    """A copy was given up because it is no longer needed."""


class NoSpace(InputError):
    """The disk has no room for a copy."""


def is_remote(path: str | Path) -> bool:
    """Whether a path is a URL. Raises InputError for `pipe:`, which would run a shell."""
    if str(path).startswith("pipe:"):
        raise InputError(f"{path}: pipe: runs a shell command and is refused; give a path or a URL")
    return "://" in str(path)


def join(folder: str, name: str) -> str:
    """The path of `name` in `folder`; a URL or an absolute path is returned as it is."""
    if is_remote(name) or os.path.isabs(name):
        return name
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def read_bytes(path: str) -> bytes | None:
    """A small file's bytes, from a path or a URL; None if there is no such file.

    Raises InputError if it cannot be read, TransientError if its server gives no answer.
    """

    def read() -> bytes:
        files, remote_path = _file_system(path)
        return bytes(files.cat_file(remote_path))

    try:
        return _try(path, read) if is_remote(path) else Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def copy(
    url: str, target: Path, sha256: str | None = None, size: int | None = None, stopped: Event | None = None
) -> tuple[str, int]:
    """Copy the file at `url` to `target`, synced. After an error a part of the file may be left behind.

    Args:
        url: The file.
        target: The copy.
        sha256: As listed in shards.jsonl; other content is fetched again a few times.
        size: Bytes, as listed there.
        stopped: When set, the copy is given up with `Stopped`.

    Returns:
        The sha256 and the size in bytes.

    Raises:
        InputError: It cannot be fetched.
        NoSpace: The disk is full.
        TransientError: Its server gives no answer.
    """

    def fetch() -> tuple[str, int]:
        files, remote_path = _file_system(url)
        files.get_file(remote_path, str(target), callback=_Watch(size, stopped))
        with target.open("rb") as file:
            os.fsync(file.fileno())
        bytes_, digest = target.stat().st_size, sha256_of(target)
        if (size is not None and bytes_ != size) or (sha256 is not None and digest != sha256):
            raise Damaged(f"came with {bytes_} bytes and sha256 {digest}, shards.jsonl lists {size} bytes and {sha256}")
        return digest, bytes_

    try:
        return _try(url, fetch, stopped)
    except OSError as error:
        raise InputError(f"{url}: cannot be fetched: {_reason(error)}") from error


def upload(source: Path, url: str, stopped: Event | None = None) -> None:
    """Copy a file to a URL.

    Args:
        source: The file.
        url: Its copy, which is there as a whole or not at all on an object store.
        stopped: When set, the copy is given up with `Stopped`, between two attempts or blocks.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: It cannot be written.
        TransientError: The server gives no answer.
    """

    def put() -> None:
        files, remote_path = _file_system(url)
        _make_folder(files, remote_path)
        files.put_file(str(source), remote_path, callback=_Watch(None, stopped))

    try:
        _try(url, put, stopped, "written")
    except FileNotFoundError as error:
        if not source.exists():
            raise
        raise InputError(f"{url}: cannot be written: {_reason(error)}") from error  # no such bucket


def write_bytes(url: str, data: bytes, stopped: Event | None = None) -> None:
    """Write a small file. Raises InputError, TransientError."""

    def put() -> None:
        files, remote_path = _file_system(url)
        _make_folder(files, remote_path)
        files.pipe_file(remote_path, data)

    try:
        _try(url, put, stopped, "written")
    except FileNotFoundError as error:
        raise InputError(f"{url}: cannot be written: {_reason(error)}") from error


def names(url: str, stopped: Event | None = None) -> list[str]:
    """What is in a folder, sorted; nothing if there is no such folder. Raises InputError, TransientError."""

    def listed() -> list[str]:
        files, remote_path = _file_system(url)
        files.invalidate_cache()  # others write there, too
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in files.ls(remote_path, detail=False))

    try:
        return _try(url, listed, stopped)
    except FileNotFoundError:
        return []


def remove(url: str, stopped: Event | None = None) -> None:
    """Remove a file, or a folder with all that is in it, if it is there. Raises InputError, TransientError."""

    def delete() -> None:
        files, remote_path = _file_system(url)
        files.invalidate_cache()
        files.rm(remote_path, recursive=True)

    with suppress(FileNotFoundError):
        _try(url, delete, stopped, "removed")


def _make_folder(files: Any, remote_path: str) -> None:
    """Make the folder of a file, where there are folders: on an object store it would make a bucket."""
    protocols = (files.protocol,) if isinstance(files.protocol, str) else files.protocol
    if _OBJECT_STORES.isdisjoint(protocols):
        files.makedirs(files._parent(remote_path), exist_ok=True)


class _Watch(Callback):
    """Ends a copy that is too long or no longer needed."""

    def __init__(self, size: int | None, stopped: Event | None) -> None:
        super().__init__()
        self._listed, self._stopped = size, stopped

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self._stopped is not None and self._stopped.is_set():
            raise Stopped
        if self._listed is not None and self.value > self._listed:
            raise Damaged(f"came with more than the {self._listed} bytes that shards.jsonl lists")


def _file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the file's path on it."""
    protocol = url.rpartition("::")[2].partition("://")[0]
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        import aiohttp  # of the extra `remote`

        # By default a copy may take at most five minutes, and proxies are not used.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT)
        options[protocol] = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    return url_to_fs(url, **options)


def _try(url: str, action: Callable[[], Result], stopped: Event | None = None, done: str = "read") -> Result:
    """The result of `action`, in one of several attempts; `done`: what the file is then, for messages.

    Raises FileNotFoundError; InputError (also NoSpace) for a permanent error, TransientError for one that persisted.
    """
    damaged = 0
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except (Stopped, FileNotFoundError):
            raise
        except Exception as error:
            reason = _reason(error)
            if isinstance(error, Damaged):
                damaged += 1
                if damaged == DAMAGED_ATTEMPTS:
                    raise InputError(f"{url}: {reason}") from error
            elif isinstance(error, OSError) and error.errno in _FULL_ERRNO:
                raise NoSpace(f"{url}: cannot be kept: {reason}") from error
            elif not _is_transient(error):
                raise InputError(f"{url}: cannot be {done}: {reason}") from error
            if attempt == ATTEMPTS:
                raise TransientError(f"{url}: cannot be {done}, tried {ATTEMPTS} times: {reason}") from error
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1)) * random.uniform(0.75, 1.25)
        logger.warning("%s: %s; again in %.1f s", url, reason, pause)
        if (stopped or Event()).wait(pause):
            raise Stopped
    raise AssertionError("unreachable")


def _is_transient(error: Exception) -> bool:
    status = _status(error)
    if status is not None:
        return status in _TRANSIENT_STATUS or status >= 500
    if isinstance(error, OSError) and error.errno in _PERMANENT_ERRNO:
        return False
    return not isinstance(error, _PERMANENT) and type(error).__name__ not in _PERMANENT_NAMES


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of aiohttp, botocore, gcsfs or huggingface_hub; None if there is none."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        statuses = [getattr(cause, "status", None), getattr(response, "status_code", None)]
        if not type(cause).__module__.startswith("aiohttp"):  # whose code need not be the server's
            statuses.append(getattr(cause, "code", None))
        if isinstance(response, dict):
            statuses.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        for status in statuses:
            if str(status).isdigit() and 400 <= int(str(status)) < 600:
                return int(str(status))
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and the chain of its causes."""
    while error is not None:
        yield error
        error = error.__cause__


def _reason(error: BaseException) -> str:
    """One line: the error's text, or its type if it has none, and the HTTP status if there is one."""
    text = " ".join(str(error).split()) or type(error).__name__
    status = _status(error)
    return text if status is None or str(status) in text else f"{status}: {text}"
