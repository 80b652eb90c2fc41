"""The source `concepts`: documents whose sentences are encoded already, in parts of which each rank reads some."""

from __future__ import annotations

import glob
import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from lcm_ds.adopt.columns import Block
from lcm_ds.adopt.numpy_part import NumpyPart, numpy_places
from lcm_ds.adopt.parts import ArrowPart, ParquetPart, Part
from lcm_ds.config import SourceConfig
from lcm_ds.data.format import SPLITS
from lcm_ds.errors import Collector, InputError, first_line
from lcm_ds.files import read_object
from lcm_ds.text.huggingface import commit_of, expand_urls, hub_files, hub_name

_INSPECTION_THREADS = 8
_HIDDEN = (".", "_")  # files and folders that Arrow and Spark pass over, too, such as _temporary
_KINDS: dict[str, type[ParquetPart] | type[ArrowPart] | type[NumpyPart]] = {
    "parquet": ParquetPart,
    "arrow": ArrowPart,
    "numpy": NumpyPart,
}
_SPLIT = re.compile(r"(?:^|/)split=([^/]+)/")
_SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation",
                "dev": "validation"}  # fmt: skip
READABLE = "parquet, .npy and .npz files, folders of them, and Hugging Face datasets"


class Place(NamedTuple):
    """A part before it is opened."""

    kind: str
    place: str
    split: str | None


class Unit(NamedTuple):
    """Consecutive rows that become one shard of each split."""

    number: int
    start: int
    stop: int


class ConceptSource:
    """Rows of all parts, in the order of their names, numbered from 0.

    config: the block `source`. index: of the same source opened before.

    Raises InputError if a path, the dataset or a column is missing, a file is of another kind, or concepts of two files
    have different sizes.
    """

    def __init__(self, config: SourceConfig, index: dict[str, Any] | None = None) -> None:
        self.config = config
        self.parts: list[Part]
        if index is None:
            self.parts = _inspect(config, places(config))
        else:
            self.parts = [_KINDS[each.pop("kind")](**each) for each in map(dict, index["parts"])]
        self.embed_dim = self._embed_dim()
        self._ends = list(accumulate(sum(part.groups) for part in self.parts))

    @property
    def supervised(self) -> bool:
        """Whether documents have a source and a target."""
        return any(part.supervised for part in self.parts)

    @property
    def total(self) -> int:
        """The number of documents."""
        return self._ends[-1] if self._ends else 0

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(part.size for part in self.parts)

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each file."""
        return {part.name: part.size for part in self.parts}

    def claims(self, size: int) -> Iterator[list[Unit]]:
        """Units of about `size` rows, in order; a list is those that one rank makes, because they are read together."""
        number, begin, start = 0, 0, 0  # `start`: of the rows that are not in a unit yet
        for part in self.parts:
            for rows in part.groups:
                pieces = round(rows / size) if rows > 2 * size else 1
                if start < begin and (pieces > 1 or begin - start + rows - size > size - (begin - start)):
                    yield [Unit(number, start, begin)]
                    number, start = number + 1, begin
                if pieces > 1:
                    ends = [begin + rows * (piece + 1) // pieces for piece in range(pieces)]
                    units = [Unit(number + piece, first, last)
                             for piece, (first, last) in enumerate(pairwise([begin, *ends]))]  # fmt: skip
                    yield from [units] if part.together else [[unit] for unit in units]
                    number, start = number + pieces, begin + rows
                begin += rows
                if begin - start >= size:
                    yield [Unit(number, start, begin)]
                    number, start = number + 1, begin
        if start < begin:
            yield [Unit(number, start, begin)]

    def blocks(self, start: int, stop: int) -> Iterator[tuple[Part, int, Block]]:
        """Rows `start` up to, not including, `stop`: part, the row in it that a block begins with, and the block."""
        at = bisect_right(self._ends, start)
        while start < stop:
            part, begin = self.parts[at], self._ends[at - 1] if at else 0
            row = 0  # of the part
            for group, rows in enumerate(part.groups):
                first, last = max(start - begin, row), min(stop - begin, row + rows)
                if first < last:
                    for block in part.read(group, first - row, last - row):
                        yield part, first, block
                        first += block.rows
                row += rows
            start, at = self._ends[at], at + 1

    def described(self) -> dict[str, Any]:
        """What export-data wrote about the dataset that the files are from; empty for other files."""
        return next((about for part in self.parts if (about := part.described()) is not None), {})

    def describe(self) -> dict[str, Any]:
        """Where the documents are from, for dataset.json."""
        keys = {"paths", "dataset", "config", "split", "revision", "id_column", "concepts_columns", "sentences_columns"}
        chosen = self.config.model_dump(include=keys, exclude_none=True)
        chosen = {key: value for key, value in chosen.items() if value not in ([], {})}
        commit = commit_of([part.place for part in self.parts])
        revision = {} if commit is None else {"revision": commit}
        group = next((part.group_column for part in self.parts if part.group_column is not None), None)
        groups = {} if group is None else {"group_column": group}
        return {"name": "concepts", **chosen, **groups, **revision, "files": len(self.parts), "bytes": self.bytes}

    def index(self) -> dict[str, Any]:
        """The parts, with the results of inspecting them."""
        names = {kind: name for name, kind in _KINDS.items()}
        return {"parts": [{"kind": names[type(part)], **part.index()} for part in self.parts]}  # type: ignore[index]

    def _embed_dim(self) -> int:
        """Numbers in a concept. Raises InputError if files differ, or there are no concepts."""
        known = [part for part in self.parts if part.width is not None]
        if not known:
            raise InputError(f"{_named(self.config)}: holds no concepts")
        for part in known:
            if part.width != known[0].width:
                raise InputError(
                    f"{part.name}: its concepts have {part.width} numbers, those of {known[0].name} {known[0].width}"
                )
        for part in self.parts:
            part.width = known[0].width
        assert known[0].width is not None
        return known[0].width


def _named(config: SourceConfig) -> str:
    return config.dataset or ", ".join(config.paths)


def places(config: SourceConfig) -> list[Place]:
    """The parts that `paths` or `dataset` name. Raises InputError."""
    # A config of a local folder is one that its card names.
    if config.dataset is not None and (config.config is not None or not Path(config.dataset).exists()):
        return _hub_places(config)
    found: list[Place] = []
    errors = Collector()
    for pattern in [config.dataset] if config.dataset is not None else config.paths:
        with errors:
            found += _expanded(pattern)
    errors.raise_if_any()
    return list(dict.fromkeys(found))


def _expanded(pattern: str) -> list[Place]:
    """The parts at a path, URL or glob."""
    if "://" in pattern:
        return [Place("parquet", url, _split_of(url)) for url in expand_urls([pattern])]
    path = Path(pattern).expanduser()
    matches = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not matches:
        raise InputError(f"source.paths: {pattern}: no such file or folder")
    return [place for match in matches for place in (_in_folder(match) if match.is_dir() else [_file(match)])]


def _file(path: Path, split: str | None = None) -> Place:
    kind = {".parquet": "parquet", ".arrow": "arrow", ".npy": "numpy"}.get(path.suffix)
    if kind is None or (kind == "numpy" and not path.with_suffix(".jsonl").is_file()):
        hint = {".tar": ": lcm-ds index takes tars", ".jsonl": ": name its folder", ".npy": ": name its folder",
                ".npz": ": name its folder"}.get(path.suffix, "")  # fmt: skip
        raise InputError(f"{path}: is none of what is read here ({READABLE}){hint}")
    return Place(kind, str(path), split or _split_of(path.as_posix()))


def _in_folder(folder: Path) -> list[Place]:
    """The parts in a folder: a dataset of datasets on disk, or all files below it that hold concepts."""
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits", [])
        return [place for split in splits for place in _saved(folder / split, split)]
    if (folder / "state.json").is_file():
        return _saved(folder, None)
    found: list[Place] = []
    for below, folders, names in os.walk(folder):
        folders[:] = sorted(folder for folder in folders if not folder.startswith(_HIDDEN))
        names = [name for name in names if not name.startswith(_HIDDEN)]
        here = Path(below)
        found += [_file(here / name) for name in sorted(names) if name.endswith((".parquet", ".arrow"))]
        if any(name.endswith((".npy", ".npz")) for name in names):
            found += [Place("numpy", str(path), _split_of(path.as_posix() + "/")) for path in numpy_places(here)]
    if not found:
        raise InputError(f"{folder}: holds nothing of what is read here ({READABLE})")
    if len(kinds := {place.kind for place in found}) > 1:
        raise InputError(f"{folder}: holds files of several kinds ({', '.join(sorted(kinds))}): name those to read")
    return found


def _saved(folder: Path, split: str | None) -> list[Place]:
    """The files of a dataset that `save_to_disk` wrote."""
    files = _json(folder / "state.json").get("_data_files", [])
    return [Place("arrow", str(folder / file["filename"]), split) for file in files]


def _json(path: Path) -> dict[str, Any]:
    return read_object(path)


def _hub_places(config: SourceConfig) -> list[Place]:
    """The files of a hub dataset's split: parquet, or what the datasets library makes of others."""
    urls = hub_files(config)
    if urls and all(url.endswith(".parquet") for url in urls):
        return [Place("parquet", url, None) for url in urls]
    import datasets

    try:
        dataset = datasets.load_dataset(config.dataset, config.config, revision=config.revision, split=config.split)
    except Exception as error:  # many kinds, from many libraries
        raise InputError(f"source: {config.dataset}: cannot be opened: {first_line(error)}") from None
    return [Place("arrow", str(file["filename"]), None) for file in dataset.cache_files]


def _split_of(place: str) -> str | None:
    """The split that a folder of the path names, as in `split=train/`; None if there is none."""
    match = _SPLIT.search(place)
    return match[1] if match else None


def _inspect(config: SourceConfig, found: list[Place]) -> list[Part]:
    """The parts, each inspected. Raises InputError with every mistake in any of them."""
    local = [place.place for place in found if "://" not in place.place]
    common = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in local]) if local else ""

    def inspect(place: Place) -> Part | InputError:
        name = hub_name(place.place) if "://" in place.place else os.path.relpath(place.place, common)
        try:
            return _KINDS[place.kind].inspect(config, place.place, name, _known_split(place))
        except InputError as error:
            return error

    with ThreadPoolExecutor(_INSPECTION_THREADS) as pool:
        results = list(pool.map(inspect, found))
    errors = Collector()
    for result in results:
        if isinstance(result, InputError):
            errors.errors += result.errors
    errors.raise_if_any()
    parts = [result for result in results if not isinstance(result, InputError)]
    for part in parts:
        if part.supervised != parts[0].supervised:
            raise InputError(
                f"{part.name}: has other columns of concepts than {parts[0].name}: one, or source and target"
            )
    if len({part.split is None for part in parts}) > 1:
        raise InputError(f"{_named(config)}: some of its files are in folders of splits (split=…) and others are not")
    if config.group_column is not None and parts and parts[0].split is not None:
        raise InputError(
            f"source.group_column: {_named(config)} has folders of splits (split=…), which decide: leave it out"
        )
    return parts


def _known_split(place: Place) -> str | None:
    """The split in which documents of a part belong. Raises InputError if there is no such split here."""
    if place.split is None:
        return None
    if place.split not in _SPLIT_NAMES:
        raise InputError(
            f"{place.place}: is of the split {place.split!r}; a dataset has {' and '.join(SPLITS)}: name only those"
        )
    return _SPLIT_NAMES[place.split]
