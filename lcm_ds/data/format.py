"""The dataset on disk: dataset.json, shards.jsonl, documents.idx and normalizer.safetensors.

A line of shards.jsonl commits a shard; dataset.json is written last and marks the dataset finished.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import safetensors.numpy
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError

from lcm_ds.config import Schema, validate
from lcm_ds.data.index.records import (
    INDEX,
    WORD,
    Count,
    DocumentIndex,
    IndexEntry,
    IndexWriter,
    has_records,
    read_record,
)
from lcm_ds.data.quantization import BFloat16, Quantization
from lcm_ds.data.remote import fetch as remote
from lcm_ds.data.remote.cache import Cache
from lcm_ds.errors import Collector, InputError
from lcm_ds.files import OpenFile, json_object, lock, sha256_of, sync, write_whole

FORMAT_VERSION = 1
DATASET = "dataset.json"
SHARDS = "shards.jsonl"
NORMALIZER = "normalizer.safetensors"
SPLITS = ("train", "validation")  # the datasets of one preparation, a folder each


@dataclass(frozen=True)
class ShardInfo:
    """One line of shards.jsonl: a finished shard."""

    # A line with other keys or types is refused.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    name: str  # the file in the dataset's folder; a path or URL for shards in other places (lcm-ds index)
    documents: Count
    concepts: Count
    bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    index: IndexEntry | None = None  # None in datasets of earlier versions
    # Earlier versions listed a supervised shard's documents here; they are in its index now.
    lengths: list[Count] | None = None
    given: list[Count] | None = None

    def line(self) -> str:
        """The canonical JSON of this shard, without a newline and without keys that are None."""
        known = {key: value for key, value in asdict(self).items() if value is not None}
        return json.dumps(known, sort_keys=True, separators=(",", ":"))

    def identity(self) -> str:
        """`line` of its name, counts, size and checksum, from which the others follow."""
        return (
            f'{{"bytes":{self.bytes},"concepts":{self.concepts},"documents":{self.documents},'
            f'"name":{json.dumps(self.name)},"sha256":"{self.sha256}"}}'
        )


class IndexFile(Schema):
    """documents.idx, for whoever fetches it."""

    bytes: Count
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Totals(Schema):
    """The sums over the shards of a dataset."""

    documents: Count
    concepts: Count
    shards: Count
    bytes: Count

    @classmethod
    def of(cls, shards: Iterable[ShardInfo]) -> Totals:
        """The sums over `shards`."""
        shards = list(shards)
        sums = {key: sum(getattr(shard, key) for shard in shards) for key in ("documents", "concepts", "bytes")}
        return cls(shards=len(shards), **sums)


class EndOfText(Schema):
    """The concept that ends every document."""

    text: str
    vector: list[float]  # [embed_dim], raw space


class Supervised(Schema):
    """Documents have a source, which is given, and a target, which is learned."""

    source_suffix: str | None = None  # the sentence that ends every source


class QuantParams(Schema):
    """How concepts are stored in 8 bits: see lcm_ds.data.quantization."""

    center: list[float]  # [embed_dim], raw space
    step: list[float]  # [embed_dim]


class DatasetInfo(Schema):
    """dataset.json."""

    format_version: Literal[1] = 1
    encoder: dict[str, Any]  # name, model, revision, …: datasets of one mixture must agree on all of it
    # threads of each process that encoded; on some CPUs the last bits of concepts depend on it
    threads: int | None = Field(None, gt=0)
    embed_dim: int = Field(gt=0)
    dtype: Literal["float16", "float32", "bfloat16", "int8"]  # of the numbers in the shards; bfloat16 lies in uint16
    quantization: QuantParams | None = None  # what int8 stands for
    extension: str = "npy"  # of the members that hold concepts
    # the sentences, if there are any: EXTENSION:FIELD of a JSON object, or EXTENSION of a text with one a line
    texts: str = "json:sentences"
    language: str | None = None
    splitter: dict[str, Any] = Field(default_factory=dict)
    end_of_text: EndOfText | None = None  # None for tars of other programs that do not name it
    # JSON members have source_sentences and target_sentences instead of sentences
    supervised: Supervised | None = None
    totals: Totals = Totals(documents=0, concepts=0, shards=0, bytes=0)
    index: IndexFile | None = None
    # its config, how many documents it gave, were kept, and were refused for what reason
    source: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """A finished dataset: its path, its dataset.json, and its shards in order of their names."""

    path: str  # a folder or a URL
    info: DatasetInfo
    shards: tuple[ShardInfo, ...]
    cache: Cache | None = None  # for remote shards
    checksums: bool = True  # whether the bytes that are read are compared with their checksums
    skip_bad: bool = False  # whether readers skip what cannot be read, instead of stopping
    index: DocumentIndex | None = field(default=None, compare=False, repr=False)  # see index/first_use.py

    @property
    def embed_dim(self) -> int:
        """Numbers in a concept."""
        return self.info.embed_dim

    @property
    def has_groups(self) -> bool:
        """Whether its documents' JSON has their groups (source.group_column), which the split keeps together."""
        return self.info.source.get("group_column") is not None

    @cached_property
    def storage(self) -> Quantization | BFloat16 | None:
        """How the numbers in the shards are decoded; None if they are the concepts."""
        if self.info.dtype == "bfloat16":
            return BFloat16()
        steps = self.info.quantization
        if steps is None:
            return None
        return Quantization(np.asarray(steps.center, np.float32), np.asarray(steps.step, np.float32))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over what identifies its shards, in order of their names; a supervised dataset has another."""
        lines = [shard.identity() for shard in self.shards]
        lines += ["supervised"] * (self.info.supervised is not None)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def location(self, index: int) -> str:
        """The path or URL of shard `index`."""
        return remote.join(self.path, self.shards[index].name)

    def is_remote(self, index: int) -> bool:
        """Whether shard `index` is at a URL."""
        return remote.is_remote(self.location(index))

    @cached_property
    def any_remote(self) -> bool:
        """Whether any of its shards is at a URL."""
        return any(self.is_remote(index) for index in range(len(self.shards)))

    def open_file(self, index: int, stopped: Event | None = None) -> OpenFile:
        """The file of shard `index`; a remote one is fetched.

        stopped: when set, fetching is given up with Stopped. Raises InputError.
        """
        location, shard = self.location(index), self.shards[index]
        if remote.is_remote(location):
            assert self.cache is not None  # open_dataset checks that
            return self.cache.open(location, shard.sha256, shard.bytes, stopped)
        try:
            return OpenFile(location)
        except OSError as error:
            raise InputError(f"{location}: cannot be read: {error.strerror}") from None

    def open_file_ahead(self, index: int, stopped: Event) -> OpenFile | None:
        """As `open_file`, before the shard is used; None if there is no room now, or another process is fetching it."""
        if not self.is_remote(index):
            return self.open_file(index)
        shard = self.shards[index]
        assert self.cache is not None
        return self.cache.open_ahead(self.location(index), shard.sha256, shard.bytes, stopped)


def open_dataset(
    path: str | Path,
    cache: Cache | None = None,
    checksums: bool = True,
    sizes: bool = True,
    skip_bad: bool = False,
) -> Dataset:
    """The dataset in a folder or at a URL.

    Args:
        path: The folder or URL.
        cache: For the shards of a remote dataset.
        checksums: Whether a shard's checksum is compared when it is first opened.
        sizes: Whether the sizes of shards are compared here.
        skip_bad: Whether readers skip bad shards; their sizes are not compared here then.

    Returns:
        The dataset.

    Raises:
        InputError: With every error: no such folder, not finished, an invalid file, a shard that is missing or has
            another size than shards.jsonl lists.
    """
    folder = str(path)
    text = _read_info(folder)
    errors = Collector()
    info: DatasetInfo | None = None
    with errors:
        info = _parse_info(text, remote.join(folder, DATASET))
    shards: list[ShardInfo] = []
    with errors:
        shards = read_shards(folder)
        if cache is None and any(remote.is_remote(remote.join(folder, shard.name)) for shard in shards):
            errors.errors.append(
                f"{folder}: has shards that are not on this machine: data.cache_dir has to name a folder to keep them"
            )
        if sizes and not skip_bad:
            errors.errors.extend(_missing_shards(folder, shards))
        if info is not None and info.totals != (totals := Totals.of(shards)):
            raise InputError(f"{folder}: {DATASET} counts {info.totals}, the lines of {SHARDS} add up to {totals}")
        if not any(shard.concepts for shard in shards):
            raise InputError(f"{folder}: holds no concepts")
    with errors:
        center, _ = read_normalizer(folder)
        if info is not None and len(center) != info.embed_dim:
            raise InputError(
                f"{folder}: {NORMALIZER} has {len(center)} dimensions, {DATASET} says embed_dim {info.embed_dim}"
            )
    errors.raise_if_any()
    assert info is not None
    return Dataset(folder, info, tuple(shards), cache, checksums, skip_bad, read_index(folder, shards))


def read_index(folder: str, shards: Sequence[ShardInfo]) -> DocumentIndex | None:
    """The index in a folder; None if it has none of all these shards. Raises InputError if it is damaged."""
    path = remote.join(folder, INDEX)
    if remote.is_remote(path) or any(shard.index is None for shard in shards) or not Path(path).is_file():
        return None
    try:
        return DocumentIndex(OpenFile(path), shards)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def read_info(path: str | Path) -> DatasetInfo:
    """dataset.json of the dataset in the folder or at the URL `path`. Raises InputError if it is not finished."""
    return _parse_info(_read_info(str(path)), remote.join(str(path), DATASET))


def finish(folder: str | Path, info: DatasetInfo) -> None:
    """Write dataset.json, the last file of a dataset; `totals` are counted from shards.jsonl.

    The index is put in the order of the shards' names before, so that it does not depend on who committed when.
    The normaliser has to exist already; the validation split has that of the training split.
    """
    read_normalizer(folder)
    _sort_index(Path(folder))
    index = Path(folder) / INDEX
    listed = IndexFile(bytes=index.stat().st_size, sha256=sha256_of(index)) if index.exists() else None
    complete = info.model_copy(update={"totals": Totals.of(read_shards(folder)), "index": listed})
    write_whole(Path(folder) / DATASET, json.dumps(complete.model_dump(), indent=2, ensure_ascii=False) + "\n")


def _sort_index(folder: Path) -> None:
    """Put the records of the index, and the lines of shards.jsonl, in the order of the shards' names.

    A kill in between leaves the new index under its partial name, where the next call finds it.
    """
    shards = read_shards(folder)
    path, partial = folder / INDEX, folder / f"{INDEX}.partial"
    if not path.exists() or any(shard.index is None for shard in shards):
        return
    if partial.exists() and has_records(partial, shards):
        os.replace(partial, path)
        return
    with IndexWriter(folder) as writer, path.open("rb") as file:
        moved = [replace(shard, index=writer.add(read_record(file, shard), shard.documents)) for shard in shards]
        if moved == shards and writer.size == path.stat().st_size:
            return
        writer.sync()
        write_whole(folder / SHARDS, "".join(shard.line() + "\n" for shard in moved))
        writer.commit()


def read_shards(folder: str | Path) -> list[ShardInfo]:
    """The committed shards in order of their names; none if there is no shards.jsonl yet.

    A last line without a newline is an interrupted commit and does not count. Raises InputError for any other line
    that cannot be read, and for a shard that is listed twice.
    """
    path = remote.join(str(folder), SHARDS)
    lines = (remote.read_bytes(path) or b"").split(b"\n")[:-1]
    errors, shards = [], {}
    for number, line in enumerate(lines, start=1):
        try:
            shard = _SHARD_INFO.validate_json(line)
        except ValidationError as error:
            reasons = "; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors())
            errors.append(f"{path}, line {number}: {reasons}")
            continue
        if shard.name in shards:
            errors.append(f"{path}, line {number}: {shard.name} is listed twice")
        shards[shard.name] = shard
    if errors:
        raise InputError(errors)
    return [shards[name] for name in sorted(shards)]


def commit(folder: str | Path, shard: ShardInfo) -> None:
    """Append the shard's line to shards.jsonl and sync it: only then is the shard part of the dataset.

    Its record, which the writer left beside it, is appended to the index before that. Any number of processes may
    commit at a time. A line cut off by a crash is removed first; a record without a line is never read.
    """
    path = Path(folder) / SHARDS
    record = record_path(folder, shard.name)
    new = not path.exists()
    with path.open("a+b") as file:
        lock(file.fileno(), fcntl.LOCK_EX, path)
        _remove_torn_line(file.fileno())
        if record.exists():
            shard = replace(shard, index=_append_record(path.with_name(INDEX), record.read_bytes(), shard.documents))
        file.write(shard.line().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync(path.parent)
    record.unlink(missing_ok=True)


def record_path(folder: str | Path, name: str) -> Path:
    """Where a shard's record in the index lies until the shard is committed."""
    return Path(folder) / f"{name}.record"


def _append_record(path: Path, record: bytes, documents: int) -> IndexEntry:
    """Append a record to the index and sync it; a record cut off by a crash is left behind, padded to a word."""
    with path.open("ab") as file:
        file.write(bytes(-file.tell() % WORD))
        at = file.tell() // WORD
        file.write(record)
        file.flush()
        os.fsync(file.fileno())
    return IndexEntry.of(record, at, documents)


def write_normalizer(folder: str | Path, center: np.ndarray, scale: np.ndarray, statistics: dict[str, Any]) -> None:
    """Write normalizer.safetensors into a dataset's folder.

    Args:
        folder: The dataset.
        center: [embed_dim], raw space, stored in fp32.
        scale: [embed_dim], likewise.
        statistics: What they were fitted on, stored with them.
    """
    write_normalizer_file(Path(folder) / NORMALIZER, center, scale, statistics)


def write_normalizer_file(path: Path, center: np.ndarray, scale: np.ndarray, statistics: dict[str, Any]) -> None:
    """As `write_normalizer`, to a file of any name."""
    tensors = {"center": np.ascontiguousarray(center, "<f4"), "scale": np.ascontiguousarray(scale, "<f4")}
    write_whole(path, safetensors.numpy.save(tensors, metadata={"statistics": json.dumps(statistics, sort_keys=True)}))


def read_normalizer(folder: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """center and scale, each fp32 [embed_dim], of the dataset in a folder or at a URL.

    Raises InputError if the file is missing or invalid.
    """
    path = remote.join(str(folder), NORMALIZER)
    data = remote.read_bytes(path)
    if data is None:
        raise InputError(f"{path}: no such file: a dataset needs its normaliser")
    try:
        tensors = safetensors.numpy.load(data)
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file: {error}") from None
    center, scale = (tensors.get(name, np.empty(0)) for name in ("center", "scale"))
    fits = center.shape == scale.shape and center.ndim == 1 and len(center) > 0
    if not fits or center.dtype != np.float32 or scale.dtype != np.float32:
        raise InputError(f"{path}: has to hold center and scale, both float32 [embed_dim]")
    if not (np.isfinite(center).all() and np.isfinite(scale).all() and (scale > 0).all()):
        raise InputError(f"{path}: center has to be finite, scale finite and above 0")
    return center, scale


_SHARD_INFO = TypeAdapter(ShardInfo)


def _read_info(folder: str) -> bytes:
    if not remote.is_remote(folder) and not Path(folder).is_dir():
        raise InputError(f"{folder}: no such dataset folder")
    text = remote.read_bytes(remote.join(folder, DATASET))
    if text is None and not remote.is_remote(folder):
        inside = [f"{folder}/{split}" for split in SPLITS if (Path(folder) / split / DATASET).is_file()]
        if inside:
            raise InputError(f"{folder}: is a folder of datasets: give {' or '.join(inside)} instead")
    if text is None:
        raise InputError(f"{folder}: not a finished dataset (it has no {DATASET}): run lcm-ds prepare again")
    return text


def _parse_info(text: bytes, path: str) -> DatasetInfo:
    mapping = json_object(text, path)
    version = mapping.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: format_version is {version!r}, this version of lcm-ds reads {FORMAT_VERSION}")
    info = validate(DatasetInfo, mapping, path)
    if info.end_of_text is not None and len(info.end_of_text.vector) != info.embed_dim:
        raise InputError(
            f"{path}: end_of_text.vector has {len(info.end_of_text.vector)} numbers, embed_dim is {info.embed_dim}"
        )
    if (info.dtype == "int8") != (info.quantization is not None):
        raise InputError(f"{path}: quantization is for dtype int8, which needs it; dtype is {info.dtype}")
    for name, values in info.quantization.model_dump().items() if info.quantization else ():
        if len(values) != info.embed_dim:
            raise InputError(f"{path}: quantization.{name} has {len(values)} numbers, embed_dim is {info.embed_dim}")
    return info


def _missing_shards(folder: str, shards: Iterable[ShardInfo]) -> list[str]:
    """An error for each listed local shard that is missing or incomplete; remote ones are checked when fetched."""
    lines = []
    for shard in shards:
        location = remote.join(folder, shard.name)
        if remote.is_remote(location):
            continue
        try:
            size = os.stat(location).st_size
        except OSError as error:
            lines.append(f"{location}: listed in {SHARDS}, cannot be read: {error.strerror}")
            continue
        if size != shard.bytes:
            lines.append(f"{location}: has {size} bytes, {SHARDS} lists {shard.bytes}")
    return lines


def _remove_torn_line(descriptor: int) -> None:
    """Truncate a file after its last newline."""
    size = os.fstat(descriptor).st_size
    tail = os.pread(descriptor, 1 << 16, max(0, size - (1 << 16)))
    if tail and not tail.endswith(b"\n"):
        os.ftruncate(descriptor, size - len(tail) + tail.rfind(b"\n") + 1)
