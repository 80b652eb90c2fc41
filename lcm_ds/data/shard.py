"""Reading shards: headers are parsed when a shard is opened, concepts are then read directly into their batch.

Whatever disagrees with shards.jsonl, dataset.json or the format is an error that names shard and key.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Lock
from tokenize import TokenError
from typing import Any

import numpy as np

from lcm_ds.data.format import SHARDS, Dataset, ShardInfo
from lcm_ds.data.index.records import INDEX, IndexEntry, make_record
from lcm_ds.data.quantization import BFloat16, Quantization
from lcm_ds.data.remote.cache import Cache
from lcm_ds.data.tar import HEAD, read_members
from lcm_ds.errors import Collector, InputError
from lcm_ds.files import OpenFile

_STORED = {"bfloat16": "uint16"}
# The keys of a supervised document's JSON in place of `sentences`.
SOURCE_SENTENCES, TARGET_SENTENCES = "source_sentences", "target_sentences"


class Shard:
    """The documents of one tar, in its order.

    keys: of each document; lengths: int64, concepts of each document; offsets: of each one's concepts in the tar.
    """

    def __init__(
        self,
        file: str | Path | OpenFile,
        info: ShardInfo | None = None,
        embed_dim: int | None = None,
        dtype: str | None = None,
        storage: Quantization | BFloat16 | None = None,
        extension: str = "npy",
        texts: str = "json:sentences",
        name: str | None = None,
        supervised: bool = False,
    ) -> None:
        """Open the tar and parse its headers.

        Args:
            file: The tar or its path.
            info: Its line in shards.jsonl, which it has to agree with.
            embed_dim: The size of its concepts; None for that of the first document.
            dtype: Their type; None for that of the first document.
            storage: The meaning of its numbers, if they are not the concepts themselves.
            extension: As in DatasetInfo.
            texts: As in DatasetInfo.
            name: For messages; None for that of `info` or of the file.
            supervised: Whether its documents have a source and a target.

        Raises:
            InputError: Naming shard and key.
        """
        self.file = file if isinstance(file, OpenFile) else _open(Path(file))
        path = self.file.path
        self.name = name or (info.name if info is not None else path.name)
        # For messages: the name of a shard in the cache is only its checksum.
        self.location = str(path) if path.name == Path(self.name).name else f"{self.name} (kept as {path})"
        self.embed_dim = embed_dim
        self.storage, self.supervised = storage, supervised
        self.dtype = None if dtype is None else stored_dtype(dtype)
        self.extension = extension
        text_extension, _, self._field = texts.partition(":")
        self._text_extension = text_extension.lower()
        if not len(self.file):
            raise InputError(f"{self.location}: is empty")
        if info is not None and len(self.file) != info.bytes:
            raise InputError(f"{self.location}: has {len(self.file)} bytes, {SHARDS} lists {info.bytes}")
        self.keys: list[str] = []
        # offset and size in the tar, by key
        self._metas: dict[str, tuple[int, int]] = {}
        self._texts: dict[str, tuple[int, int]] = {}
        self._npys: list[tuple[int, int]] = []
        self.offsets: list[int] = []
        self.unread: list[
            str
        ] = []  # members that end in the extension and are no documents by WebDataset's rule of keys
        lengths = []
        ending = f".{extension}"
        try:
            members = read_members(self.file, self.location)
        except OSError as error:
            raise InputError(f"{self.location}: cannot be read: {error.strerror}") from None
        for name, offset, size, head in zip(*members, strict=True):
            key, kind = split_name(name)
            if kind == extension:
                length = _length(head, size, self.embed_dim, self.dtype)
                begin = HEAD
                if length is None:
                    begin, length = self._check(key, offset, size, head)
                self.keys.append(key)
                self._npys.append((offset, size))
                self.offsets.append(offset + begin)
                lengths.append(length)
            elif kind == "json":
                self._metas[key] = (offset, size)
            elif kind == self._text_extension:
                self._texts[key] = (offset, size)
            elif kind.endswith(ending) or (not kind and name.lower().endswith(ending)):
                self.unread.append(name)
        self.lengths = np.array(lengths, np.int64)
        self._check_counts(info)

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.keys)

    def concepts(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Concepts `start` to `stop` of the document, all by default: [n, embed_dim], raw space.

        In the stored dtype, or the decoded one (see lcm_ds.data.quantization). Raises InputError.
        """
        first, last, _ = slice(start, stop).indices(int(self.lengths[document]))
        assert self.embed_dim is not None
        assert self.dtype is not None
        out = np.empty((last - first, self.embed_dim), self.dtype if self.storage is None else self.storage.dtype)
        self.read_into(out, document, first)
        return out

    def read_into(self, out: np.ndarray, document: int, start: int) -> None:
        """Read concepts of the document, from `start` on, into `out` [n, embed_dim], raw space, in `out`'s dtype.

        out: contiguous. Raises InputError if the file cannot be read or has become shorter.
        """
        assert self.dtype is not None
        offset = self.offsets[document] + start * out.shape[1] * self.dtype.itemsize
        same = out.dtype == self.dtype and self.storage is None
        stored = out if same else np.empty(out.shape, self.dtype)
        try:
            complete = self.file.read_into(stored.reshape(-1).view(np.uint8).data, offset)
        except OSError as error:
            raise InputError(f"{self.location}: {self.keys[document]}: cannot be read: {error.strerror}") from None
        if not complete:
            raise InputError(f"{self.location}: {self.keys[document]}: is cut off: the file has become shorter")
        if self.storage is not None:
            self.storage.decode(stored, out)
        elif not same:
            out[...] = stored

    def stored(self, document: int) -> bytes:
        """The bytes of the document's concepts, as they are stored. Raises InputError."""
        assert self.dtype is not None
        assert self.embed_dim is not None
        size = int(self.lengths[document]) * self.embed_dim * self.dtype.itemsize
        return self._bytes(self.keys[document], self.offsets[document], size)

    def index_record(self) -> bytes:
        """The shard's record in documents.idx, for which its concepts are read. Raises InputError."""
        size = 0 if self.dtype is None else (self.embed_dim or 0) * self.dtype.itemsize
        return make_record(map(self.stored, range(len(self))), size, self.offsets, self.lengths, self.given)

    def members(self, document: int) -> dict[str, bytes]:
        """The document's files in the tar, by extension."""
        key = self.keys[document]
        files = {self.extension: self._npys[document]}
        for extension, members in (("json", self._metas), (self._text_extension, self._texts)):
            if key in members:
                files[extension] = members[key]
        return {extension: self._bytes(f"{key}.{extension}", *member) for extension, member in files.items()}

    def meta(self, document: int) -> dict[str, Any]:
        """The document's JSON, with `id`, `source` and `sentences`.

        In a tar of another program they may be missing: the key, the shard's name, and no sentences are the defaults.
        Raises InputError if the JSON is invalid, or if the numbers of sentences and concepts differ.
        """
        key = self.keys[document]
        meta: dict[str, Any] = {"id": key, "source": self.name}
        if key in self._metas:
            meta |= self._object(key, "json", self._metas[key])
        sentences = self._sentences(key, meta)
        count, length = len(sentences or ()), int(self.lengths[document])
        if sentences is not None and count != length:
            raise InputError(f"{self.location}: {key}: has {count} sentences and {length} concepts")
        return meta | {"sentences": sentences or []}

    @property
    def groups(self) -> list[str | None]:
        """What each document shares with others (source.group_column), None if nothing. Raises InputError as `meta`."""
        groups = (self.meta(document).get("group") for document in range(len(self)))
        return [None if group is None else str(group) for group in groups]

    @cached_property
    def given(self) -> np.ndarray:
        """int64: how many concepts of each document are its source, in a supervised dataset; else 0.

        Read from the documents' JSON on first use. Raises InputError if one lacks its source or target, or as `meta`
        does.
        """
        if not self.supervised:
            return np.zeros(len(self), np.int64)
        return np.array([self._given(document) for document in range(len(self))], np.int64)

    def _given(self, document: int) -> int:
        meta = self.meta(document)
        lengths = [len(meta.get(part) or ()) for part in (SOURCE_SENTENCES, TARGET_SENTENCES)]
        if 0 in lengths:
            key = self.keys[document]
            raise InputError(
                f"{self.location}: {key}: has {lengths[0]} {SOURCE_SENTENCES} and {lengths[1]} {TARGET_SENTENCES}; a "
                "supervised document has both"
            )
        return lengths[0]

    def _sentences(self, key: str, meta: dict[str, Any]) -> list[Any] | None:
        """The document's sentences, from JSON or text; None if it has none."""
        if self.supervised:
            parts = [meta.get(part, []) for part in (SOURCE_SENTENCES, TARGET_SENTENCES)]
            if not all(isinstance(part, list) for part in parts):
                names = f"{SOURCE_SENTENCES} and {TARGET_SENTENCES}"
                raise InputError(f"{self.location}: {key}.json: {names} have to be lists of sentences")
            return [*parts[0], *parts[1]]
        extension = self._text_extension
        if self._field:
            if extension != "json":
                meta = self._object(key, extension, self._texts[key]) if key in self._texts else {}
            if self._field not in meta:
                return None
            if not isinstance(sentences := meta[self._field], list):
                raise InputError(
                    f"{self.location}: {key}.{extension}: has to be an object with a list of {self._field}"
                )
            return sentences
        if key not in self._texts:
            return None
        try:
            text = self._bytes(f"{key}.{extension}", *self._texts[key]).decode("utf-8-sig")
            text = text.replace("\r\n", "\n").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.location}: {key}.{extension}: not UTF-8: {error}") from None
        return text.split("\n") if text else []

    def _object(self, key: str, extension: str, member: tuple[int, int]) -> dict[str, Any]:
        """The JSON object in a member of the tar, given by offset and size."""
        location = f"{self.location}: {key}.{extension}"
        try:
            meta = json.loads(self._bytes(f"{key}.{extension}", *member))
        except ValueError as error:
            raise InputError(f"{location}: not JSON: {error}") from None
        if not isinstance(meta, dict):
            raise InputError(f"{location}: has to be an object with a list of {self._field}")
        return meta

    def _bytes(self, name: str, offset: int, size: int) -> bytes:
        """Bytes of the tar; `name`, the member that they belong to, is for messages."""
        try:
            return self.file[offset : offset + size]
        except OSError as error:
            raise InputError(f"{self.location}: {name}: cannot be read: {error.strerror}") from None

    def _check(self, key: str, offset: int, size: int, head: bytes) -> tuple[int, int]:
        """The offset of the document's numbers in its member, and how many concepts they are."""
        location = f"{self.location}: {key}.{self.extension}"
        # The length of the header: two bytes in version 1 of the format, four after it.
        width = 2 if head[6:7] == b"\1" else 4
        begin = 8 + width + int.from_bytes(head[8 : 8 + width], "little")
        header = head if begin == len(head) <= size else self._bytes(key, offset, min(begin, size))
        try:
            shape, fortran_order, dtype = _npy_header(header)
        except ValueError as error:
            raise InputError(f"{location}: not an .npy file: {error}") from None
        if dtype.hasobject:
            raise InputError(f"{location}: holds pickled objects, which are never loaded; concepts are plain numbers")
        if dtype.kind == "V":
            raise InputError(f"{location}: holds {dtype}; concepts are plain numbers")
        if fortran_order and len(shape) == 2 and min(shape) > 1:
            raise InputError(
                f"{location}: {list(shape)} is in Fortran order (column by column): save it again with "
                "numpy.ascontiguousarray, as concepts are read where they are"
            )
        if len(shape) != 2 or min(shape) < 0:
            raise InputError(f"{location}: has shape {list(shape)}; concepts are [n, embed_dim], row by row")
        self.dtype, self.embed_dim = self.dtype or dtype, self.embed_dim or shape[1]
        if dtype != self.dtype:
            raise InputError(f"{location}: is {dtype}, its dataset is {self.dtype}")
        if shape[1] != self.embed_dim:
            raise InputError(f"{location}: has embed_dim {shape[1]}, its dataset {self.embed_dim}")
        if begin + shape[0] * shape[1] * dtype.itemsize != size:
            raise InputError(f"{location}: has {size} bytes, which is not what {list(shape)} {dtype} takes")
        return begin, shape[0]

    def _check_counts(self, info: ShardInfo | None) -> None:
        if len(keys := set(self.keys)) != len(self.keys):
            twice = next(key for i, key in enumerate(self.keys) if key in self.keys[:i])
            raise InputError(f"{self.location}: {twice}: two documents have this key")
        if orphans := self._metas.keys() - keys:
            raise InputError(f"{self.location}: {min(orphans)}: has a .json and no .{self.extension}")
        counts = (len(self), int(self.lengths.sum()))
        if info is not None and counts != (info.documents, info.concepts):
            raise InputError(
                f"{self.location}: has {counts[0]} documents with {counts[1]} concepts, "
                f"{SHARDS} lists {info.documents} with {info.concepts}"
            )


def stored_dtype(dtype: str) -> np.dtype:
    """The type of the numbers in the shards of a dataset of `dtype`."""
    return np.dtype(_STORED.get(dtype, dtype)).newbyteorder("<")


def open_shard(dataset: Dataset, index: int, stopped: Event | None = None) -> Shard:
    """Shard `index` of a dataset, checked against it; fetched first if it is remote.

    stopped: when set, fetching is given up with Stopped. Raises InputError.
    """
    info, listed = dataset.info, dataset.shards[index]
    file = dataset.open_file(index, stopped)
    sha256 = _checksum(file) if dataset.checksums else listed.sha256
    if sha256 != listed.sha256 and dataset.is_remote(index):  # it has changed since it was fetched
        assert dataset.cache is not None
        dataset.cache.invalidate(file)
        file = dataset.open_file(index, stopped)
        sha256 = _checksum(file)
    supervised = info.supervised is not None
    shard = Shard(
        file, listed, info.embed_dim, info.dtype, dataset.storage, info.extension, info.texts, supervised=supervised
    )
    _compare(shard, sha256, listed)
    return shard


def open_shard_once(dataset: Dataset, index: int) -> Shard:
    """`open_shard` for a single use: a fetched file is deleted together with the `Shard`."""
    with _temporary_cache(dataset) as uncached:
        return open_shard(uncached, index)  # it stays readable when its name is gone


def verify(dataset: Dataset, threads: int = 4) -> Iterator[list[str]]:
    """Read every shard again, a few at a time; yields the errors of each, in order.

    Checked are its checksum, and of every document its array, its JSON, the number of sentences, and its place in the
    index.
    """

    def check(index: int) -> list[str]:
        errors = Collector()
        with errors, _temporary_cache(replace(dataset, checksums=False)) as uncached:
            shard, info = open_shard(uncached, index), dataset.shards[index]
            with errors:
                _compare(shard, _hashed(shard.file), info)
            for document in range(len(shard)):
                with errors:
                    shard.meta(document)
            if not errors.errors:
                with errors:
                    record = shard.index_record()  # raises if a supervised document lacks one of its parts
                    if info.index not in (None, IndexEntry.of(record, info.index.at if info.index else 0, len(shard))):
                        raise InputError(f"{shard.location}: its record in {INDEX} is of other documents")
        return errors.errors

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(check, range(len(dataset.shards)))


@contextmanager
def _temporary_cache(dataset: Dataset) -> Iterator[Dataset]:
    """The dataset, its remote shards fetched into a folder that lasts as long as the context."""
    if dataset.cache is None:  # all are on this machine
        yield dataset
        return
    Path(dataset.cache.folder).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=dataset.cache.folder, prefix="shard-") as folder:
        yield replace(dataset, cache=Cache(folder))


def _compare(shard: Shard, sha256: str, info: ShardInfo) -> None:
    if sha256 != info.sha256:
        raise InputError(f"{shard.location}: has sha256 {sha256}, {SHARDS} lists {info.sha256}: its bytes have changed")


class _Checksum:
    """The sha256 of a file, computed on first use."""

    def __init__(self) -> None:
        self.lock, self.sha256 = Lock(), ""

    def of(self, file: OpenFile) -> str:
        with self.lock:  # a second thread waits for the first
            self.sha256 = self.sha256 or _hashed(file)
            return self.sha256


@lru_cache(maxsize=1 << 18)
def _known(device: int, inode: int, changed: int) -> _Checksum:
    return _Checksum()


def _checksum(file: OpenFile) -> str:
    """The file's sha256, read once a process: epochs come back to the same shards."""
    status = file.status()
    return _known(status.st_dev, status.st_ino, status.st_mtime_ns).of(file)


def _hashed(file: OpenFile) -> str:
    try:
        return file.sha256()
    except OSError as error:
        raise InputError(f"{file.path}: cannot be read: {error.strerror}") from None


def _open(path: Path) -> OpenFile:
    try:
        return OpenFile(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def is_apple_double(name: str) -> bool:
    """Whether this is what tar of macOS keeps beside a file, under its name behind "._"."""
    return name.rpartition("/")[2].startswith("._")


def split_name(name: str) -> tuple[str, str]:
    """Key and extension as in WebDataset: split at the first dot after the last slash."""
    if "/" not in name:
        key, _, kind = name.partition(".")
        return (key, kind.lower()) if key else (name, "")
    dot = name.find(".", name.rfind("/") + 1)
    return (name[:dot], name[dot + 1 :].lower()) if dot > 0 else (name, "")


@lru_cache(maxsize=1 << 14)  # documents of the same length have the same header
def _length(head: bytes, size: int, embed_dim: int | None, dtype: np.dtype | None) -> int | None:
    """The number of concepts in an array, by its first HEAD bytes; None if it is not of the usual kind."""
    width = 2 if head[6:7] == b"\1" else 4
    if embed_dim is None or dtype is None or 8 + width + int.from_bytes(head[8 : 8 + width], "little") != HEAD:
        return None
    try:
        shape, fortran_order, stored_dtype = _npy_header(head)
    except ValueError:
        return None
    usual = len(shape) == 2 and shape[0] >= 0 and shape[1] == embed_dim and stored_dtype == dtype and not fortran_order
    return shape[0] if usual and HEAD + shape[0] * embed_dim * dtype.itemsize == size else None


def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, fortran_order and dtype. Raises ValueError."""
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format is not read here")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        return read(file)
    except (TokenError, SyntaxError, TypeError, MemoryError, RecursionError) as error:  # the header is Python
        raise ValueError(f"its header cannot be read: {error}") from None
