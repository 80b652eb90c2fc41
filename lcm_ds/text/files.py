"""The source `files`: text files, one document each; and the expansion of paths and globs."""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec

from lcm_ds.config import SourceConfig
from lcm_ds.errors import InputError
from lcm_ds.text.base import UNREADABLE, TextDocument, even_units, window


class FilesSource:
    """UTF-8 text files in the order of their paths; a document's id is its path.

    Raises InputError if a path or glob names no file.
    """

    def __init__(self, config: SourceConfig, index: dict[str, Any] | None = None) -> None:
        self.config = config
        if index is None:
            self.files = expand(config.paths)
            self._sizes = [path.stat().st_size for path in self.files]
        else:
            self.files, self._sizes = [Path(path) for path in index["files"]], index["sizes"]
        self._bytes = sum(self._sizes)

    @property
    def total(self) -> int:
        """The number of documents."""
        return len(self.files[slice(*window(self.config, 0, None))])

    @property
    def characters(self) -> int:
        """Approximated by the bytes of the files."""
        return round(self._bytes * self.total / max(1, len(self.files)))

    def units(self, size: int) -> Iterator[tuple[int, int]]:
        """Ranges of `size` files."""
        return even_units(self.total, size)

    def documents(self, start: int = 0, stop: int | None = None) -> Iterator[TextDocument]:
        """Files `start` up to, not including, `stop`; one that is not UTF-8 is a refused document.

        Raises InputError naming a file that cannot be opened, or whose size has changed since the source was opened.
        """
        rows = slice(*window(self.config, start, stop))
        for path, size in zip(self.files[rows], self._sizes[rows], strict=True):
            check_size(str(path), str(path), size)
            text, refused, problem = "", None, None
            try:
                text = path.read_bytes().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                refused, problem = UNREADABLE, f"{path}: not UTF-8 text: {error.reason} at byte {error.start}"
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror}") from None
            yield TextDocument(path.as_posix(), "files", text, refused, problem=problem, named=False)

    def describe(self) -> dict[str, Any]:
        """Where the documents are from, for dataset.json."""
        chosen = self.config.model_dump(include={"paths", "skip", "take"}, exclude_defaults=True)
        return {"name": "files", **chosen, "files": len(self.files), "bytes": self._bytes}

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each file."""
        return dict(zip(map(str, self.files), self._sizes, strict=True))

    def index(self) -> dict[str, Any]:
        """The files and their sizes."""
        return {"files": [str(path) for path in self.files], "sizes": self._sizes}


def expand(paths: Sequence[str]) -> list[Path]:
    """The files that match paths and globs (`**` is any depth), each once, sorted by name.

    Raises InputError with a line for every path that names no file.
    """
    errors = []
    found: dict[str, Path] = {}  # by absolute path: a file may be named in several ways
    for pattern in paths:
        path = Path(pattern).expanduser()
        if path.is_dir():
            errors.append(f"source.paths: {pattern} is a folder; name files, or a glob such as {path}/*")
            continue
        matches = {path} if path.is_file() else {Path(name) for name in glob.glob(str(path), recursive=True)}
        files = {match for match in matches if match.is_file()}
        if not files:
            errors.append(f"source.paths: {pattern}: no such file")
        for file in sorted(files):
            found.setdefault(os.path.abspath(file), file)
    if errors:
        raise InputError(errors)
    return sorted(found.values())


COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_PIECE = 1 << 20  # bytes read at a time


def open_plain(place: str) -> Any:
    """A file at a path or URL, decompressed as its name says. Raises OSError and what the libraries raise."""
    if place.endswith(".zst"):  # Python before 3.14 has no module for it, pyarrow reads it
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(fsspec.open(place, "rb").open(), "zstd"), _PIECE)
    # Remote files of fsspec read megabytes for each line that they are asked for.
    return io.BufferedReader(fsspec.open(place, "rb", compression="infer").open(), _PIECE)


def size_of(place: str) -> int:
    """Bytes of the file at a path or URL. Raises OSError and what the libraries of remote places raise."""
    filesystem, path = fsspec.core.url_to_fs(place)
    return int(filesystem.size(path))


def stamp(place: str) -> tuple[int, int] | None:
    """Bytes and time of change of a local file, by which one that is kept open is known; None if it is not there."""
    try:
        status = os.stat(place)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def check_size(place: str, name: str, size: int) -> None:
    """Raise InputError if a local file is gone or its size has changed since the source was opened."""
    if "://" in place:
        return
    try:
        now = os.path.getsize(place)
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from None
    if now != size:
        raise InputError(
            f"{name}: has {now} bytes, but had {size} when the source was looked at: restore it, or choose a new output"
        )
