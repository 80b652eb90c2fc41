"""Files of datasets that are not on this machine: read through fsspec, shards kept in a cache by their checksum.

A file of the cache has the name of its sha256 and was checked against it when it came, so it is never half a shard.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

import fsspec

from lcm_ds.errors import InputError


def is_remote(path: str | Path) -> bool:
    """Whether a path is a URL. Raises InputError for `pipe:`, which would run a shell."""
    if str(path).startswith("pipe:"):
        raise InputError(f"{path}: pipe: runs a shell command and is refused; give a path or a URL")
    return "://" in str(path)


def join(folder: str, name: str) -> str:
    """The place of `name` in `folder`; a name that is a URL or an absolute path stands for itself."""
    if is_remote(name) or os.path.isabs(name):
        return name
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def read_bytes(path: str) -> bytes | None:
    """A small file's bytes, from a path or a URL; None where there is no such file. Raises InputError otherwise."""
    try:
        if not is_remote(path):
            return Path(path).read_bytes()
        with fsspec.open(path, "rb") as file:
            return bytes(file.read())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def fetch(url: str, sha256: str, size: int, cache_dir: str | Path) -> Path:
    """The file in `cache_dir` that holds the shard at `url`, brought there if it is not there yet.

    Raises InputError where it cannot be read, or what came is not what shards.jsonl lists (`sha256`, `size` in bytes).
    """
    target = Path(cache_dir) / f"{sha256}.tar"
    if target.exists():
        return target
    Path(cache_dir).mkdir(parents=True, exist_ok=True)
    # Ranks of a node share the cache: each writes a file of its own, and the last rename wins with the same bytes.
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
    try:
        digest, came = download(url, partial)
        if (digest, came) != (sha256, size):
            raise InputError(
                f"{url}: came with {came} bytes and sha256 {digest}, shards.jsonl lists {size} bytes and {sha256}"
            )
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def download(url: str, target: Path) -> tuple[str, int]:
    """Copy the file at `url` to `target`; returns its sha256 and its size in bytes. Raises InputError."""
    digest, came = hashlib.sha256(), 0
    try:
        with fsspec.open(url, "rb") as source, target.open("wb") as file:
            while piece := source.read(1 << 20):
                digest.update(piece)
                came += len(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{url}: cannot be fetched: {error}") from error
    return digest.hexdigest(), came
