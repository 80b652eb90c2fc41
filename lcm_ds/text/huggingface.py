"""The source `huggingface`: a dataset of the hub, a folder of one, or parquet, JSONL and CSV files here or at any URL.

Parquet is read by row groups and JSONL from marked lines, so that any number of processes can share a source. Hub
datasets in other formats are streamed through the datasets library, from the beginning to the range.
"""

from __future__ import annotations

import os
import re
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import fsspec

from lcm_ds.config import SourceConfig
from lcm_ds.errors import Collector, InputError, first_line
from lcm_ds.hub import work_offline_without
from lcm_ds.text.base import TextDocument, even_units, window
from lcm_ds.text.columns import Columns
from lcm_ds.text.files import COMPRESSED, expand
from lcm_ds.text.jsonl import JsonlFile
from lcm_ds.text.parquet import ParquetFile
from lcm_ds.text.saved import SavedDataset
from lcm_ds.text.stream import Stream
from lcm_ds.text.table import TableFile

_SAVED = ("state.json", "dataset_dict.json")  # one of them is in each folder of save_to_disk
_HUB = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/")  # a repository, and its revision
_INSPECTION_THREADS = 16  # footers are small and may be remote
File = ParquetFile | JsonlFile | TableFile | SavedDataset
_KINDS: dict[str, type[ParquetFile] | type[JsonlFile] | type[TableFile] | type[SavedDataset]] = {
    ".parquet": ParquetFile,
    ".jsonl": JsonlFile,
    ".json": JsonlFile,
    ".ndjson": JsonlFile,
    ".csv": TableFile,
    ".tsv": TableFile,
    ".arrow": SavedDataset,
}
_READ = "parquet, JSONL (.jsonl, .ndjson, .json), CSV, TSV (these also as .gz, .zst, .bz2, .xz) and datasets' .arrow"


class HuggingFaceSource:
    """Rows of a dataset, in its own order; files follow one another in the order of their names.

    A row's id is its `id_column`; without one, or if it is null, the name of the file or dataset and the row's index:
    `part-0.parquet#17`. A null text becomes an empty one. A row that cannot be read (broken JSON, not an object, no
    text column, a text that is not a string or not UTF-8), or that the filter or the language excludes, becomes a
    refused document without text.

    Raises InputError if a file, the dataset, or a column is missing, or a file is of another kind.
    """

    def __init__(self, config: SourceConfig, language: str = "en", index: dict[str, Any] | None = None) -> None:
        self.config = config
        columns = Columns(config, language)
        self._stream: Stream | None = None
        self._files: list[File] = []
        self._commit: str | None = None
        if index is not None:
            self._commit = index["commit"]
            self._files = [_kind(file["name"])(columns=columns, **file) for file in index["files"]]
        elif config.dataset is not None and is_local(config):
            self._files = _inspect(columns, *_local(config))
        elif config.dataset is not None:
            places = hub_files(config)
            self._commit = commit_of(places)
            if all(place.endswith(".parquet") for place in places):
                self._files = _inspect(columns, places, list(map(hub_name, places)))
        else:
            places, names = _places(config.paths)
            self._commit = commit_of(places)
            self._files = _inspect(columns, places, names)
        if config.dataset is not None and not self._files:
            self._stream = Stream(columns, self._commit or config.revision, inspect=index is None)
        self._ends = list(accumulate(file.rows for file in self._files))

    @property
    def total(self) -> int | None:
        """The number of documents; None for hub datasets that are not parquet."""
        if self._stream is not None:
            return None
        first, last = window(self.config, 0, None)
        rows = self._ends[-1] if self._ends else 0
        return max(0, (rows if last is None else min(rows, last)) - first)

    @property
    def characters(self) -> int | None:
        """Approximated by the text column's bytes and the share of rows taken."""
        if self.total is None or not self._ends:
            return None
        return round(sum(file.characters for file in self._files) * self.total / max(1, self._ends[-1]))

    def units(self, size: int) -> Iterator[tuple[int, int]]:
        """Ranges of about `size` documents that end with row groups; larger groups are split evenly."""
        if self._stream is not None:
            yield from even_units(None, size)
            return
        skip, last = window(self.config, 0, None)
        last = self._ends[-1] if last is None and self._ends else last or 0
        start = 0
        for rows in _grouped((rows for file in self._files for rows in file.pieces(size)), size):
            begin, end = max(start, skip), min(start + rows, last)
            if begin < end:
                yield begin - skip, end - skip
            start += rows

    def documents(self, start: int = 0, stop: int | None = None) -> Iterator[TextDocument]:
        """Rows `start` up to, not including, `stop`, after `skip`."""
        first, last = window(self.config, start, stop)
        if self._stream is not None:
            yield from self._stream.read(first, last)
            return
        rows = self._ends[-1] if self._ends else 0
        last = rows if last is None else min(rows, last)
        at = bisect_right(self._ends, first)
        while first < last:
            file, begin = self._files[at], self._ends[at - 1] if at else 0
            until = min(last, self._ends[at])
            yield from file.read(first - begin, until - begin)
            first, at = until, at + 1

    def describe(self) -> dict[str, Any]:
        """Where the documents are from, for dataset.json."""
        texts = {"source_column", "target_column"} if self.config.supervised else {"text_column"}
        keys = {"dataset", "config", "split", "revision", "paths", "id_column", "group_column", "language_column",
                "script_column", "languages", "filter", "skip", "take", *texts}  # fmt: skip
        chosen = self.config.model_dump(include=keys, exclude_none=True)
        files = {"files": len(self._files), "bytes": sum(file.size for file in self._files)} if self._files else {}
        commit = {"revision": self._commit} if self._commit else {}
        chosen = {key: value for key, value in chosen.items() if value not in ([], {}, 0)}
        return {"name": "huggingface", **chosen, **commit, **files}

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each file; empty if a dataset is streamed."""
        return {file.name: file.size for file in self._files}

    def index(self) -> dict[str, Any]:
        """The files, with the results of inspecting them."""
        return {"commit": self._commit, "files": [file.index() for file in self._files]}


def hub_files(config: SourceConfig) -> list[str]:
    """The URLs of a hub dataset's files in their order, each with the commit. Raises InputError."""
    outage = work_offline_without(str(config.dataset))
    try:
        import datasets
    except ImportError:
        raise InputError("datasets of the hub need: pip install 'lcm-ds[prepare]'") from None
    try:
        builder = datasets.load_dataset_builder(config.dataset, name=config.config, revision=config.revision)
    except Exception as error:
        # An OSError if it is missing or unreachable, a ValueError if it has no such config, and others.
        raise InputError(f"source: {config.dataset}: cannot be opened: {outage or first_line(error)}") from None
    if outage:
        print(f"warning: {config.dataset}: {outage}; the copy in the cache is used", file=sys.stderr, flush=True)
    splits = builder.config.data_files or {}
    if splits and config.split not in splits:
        raise InputError(
            f"source.split: {config.dataset} has no split {config.split!r}; it has {', '.join(map(str, splits))}"
        )
    return [str(place) for place in splits.get(config.split, ())]


def commit_of(places: Sequence[str]) -> str | None:
    """The commit of files of the hub; None of others, and if they are of several repositories."""
    commits = {match[1] for place in places if (match := re.search(r"@([0-9a-f]{40})/", place))}
    return commits.pop() if len(commits) == 1 else None


def hub_name(place: str) -> str:
    """A file of the hub without the commit: REPOSITORY/PATH; other URLs as they are."""
    return re.sub(r"^hf://datasets/([^/@]+/[^/@]+)(@[^/]+)?/", r"\1/", place)


def expand_urls(urls: Sequence[str]) -> list[str]:
    """The files at URLs and globs in them (`*`), each once; those of the hub with the commit they are read at.

    Raises InputError with a line for each that matches nothing, or whose server does not list its files.
    """
    found: dict[str, None] = {}
    errors = Collector()
    for url in urls:
        with errors:
            found |= dict.fromkeys(_expand_url(url))
    errors.raise_if_any()
    return list(found)


def _expand_url(url: str) -> list[str]:
    repository = _HUB.match(url)
    outage = None if repository is None else work_offline_without(url)
    try:
        if repository is not None:
            from huggingface_hub import HfApi

            commit = HfApi().dataset_info(repository[1], revision=repository[2]).sha
            url = f"hf://datasets/{repository[1]}@{commit}/{url[repository.end() :]}"
        if "*" not in url:
            return [url]
        filesystem, pattern = fsspec.core.url_to_fs(url)
        matches = [str(filesystem.unstrip_protocol(match)) for match in sorted(filesystem.glob(pattern))]
    except Exception as error:  # of the libraries of remote places
        raise InputError(f"source.paths: {url}: cannot be listed: {outage or first_line(error)}") from None
    if not matches:
        raise InputError(f"source.paths: {hub_name(url)}: no such file")
    return matches


def _places(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files and URLs in order, and their names: a file's is its path below the common folder."""
    urls = expand_urls([path for path in paths if "://" in path])
    files = expand([path for path in paths if "://" not in path])
    common = os.path.commonpath([path.parent for path in files]) if files else ""
    names = [Path(os.path.relpath(path, common)).as_posix() for path in files]
    return [*map(str, files), *urls], [*names, *map(hub_name, urls)]


def is_local(config: SourceConfig) -> bool:
    """Whether the dataset is a folder or a file here."""
    return config.dataset is not None and Path(config.dataset).exists()


def _local(config: SourceConfig) -> tuple[list[str], list[str]]:
    """The files of a local dataset that are read as those of `paths`, and their names; none if datasets streams it."""
    path = Path(str(config.dataset))
    if path.is_file():
        return [str(path)], [path.name]
    if any((path / name).is_file() for name in _SAVED):
        return [str(path)], [f"{path.name}.arrow"]
    places = hub_files(config)
    # A .json may be one list, which datasets reads.
    if not all(_suffix(place) in _KINDS.keys() - {".json"} for place in places):
        return [], []
    return places, [Path(os.path.relpath(place, path)).as_posix() for place in places]


def _inspect(columns: Columns, places: Sequence[str], names: Sequence[str]) -> list[File]:
    """The files, each inspected. Raises InputError with every mistake in any of them."""
    errors = Collector()

    def inspect(place: str, name: str) -> File | InputError:
        try:
            return _kind(name).inspect(columns, place, name)
        except InputError as error:
            return error

    with ThreadPoolExecutor(_INSPECTION_THREADS) as pool:
        results = list(pool.map(inspect, places, names))
    for each in results:
        if isinstance(each, InputError):
            errors.errors.extend(each.errors)
    errors.raise_if_any()
    return [each for each in results if not isinstance(each, InputError)]


def _kind(name: str) -> type[ParquetFile] | type[JsonlFile] | type[TableFile] | type[SavedDataset]:
    kind = _KINDS.get(_suffix(name))
    if kind is None:
        raise InputError(f"source.paths: {name}: is not read, by its name; what is read: {_READ}")
    return kind


def _suffix(name: str) -> str:
    """What a file's name ends in, compression aside."""
    suffixes = [suffix for suffix in Path(name).suffixes if suffix not in COMPRESSED]
    return suffixes[-1].lower() if suffixes else ""


def _grouped(pieces: Iterator[int], size: int) -> Iterator[int]:
    """Pieces joined to about `size` rows."""
    rows = 0
    for piece in pieces:
        if rows and rows + piece - size > size - rows:  # further from it with the piece than without
            yield rows
            rows = 0
        rows += piece
        if rows >= size:
            yield rows
            rows = 0
    if rows:
        yield rows
