"""Reading shards: their headers are parsed when they are opened, then concepts are read straight to where they belong.

What disagrees with shards.jsonl or dataset.json, or is not what the format allows, is an error that names shard and
key.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from tokenize import TokenError
from typing import Any

import numpy as np

from lcm_ds.data.cache import Cache
from lcm_ds.data.format import SHARDS, Dataset, ShardInfo
from lcm_ds.data.quantization import BFloat16, Quantization
from lcm_ds.data.tar import HEAD, read_members
from lcm_ds.errors import Collector, InputError
from lcm_ds.files import OpenFile, read_ahead, sha256_of

_STORED = {"bfloat16": "uint16"}


class Shard:
    """The documents of one tar, in its order.

    keys: of each document; lengths: int64, concepts of each document. `info`, `embed_dim` and `dtype` are what the tar
    has to agree with; left out, embed_dim and dtype are those of its first document (None where it has none).
    storage: what its numbers stand for. extension, texts: as in DatasetInfo. name: where it is from, for messages; by
    default that of `info` or of the file. Raises InputError naming shard and key.
    """

    def __init__(
        self,
        path: str | Path,
        info: ShardInfo | None = None,
        embed_dim: int | None = None,
        dtype: str | None = None,
        storage: Quantization | BFloat16 | None = None,
        extension: str = "npy",
        texts: str = "json:sentences",
        name: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.name = name or (info.name if info is not None else self.path.name)
        # For messages: a shard of the cache has its checksum for a name, which tells nobody where it is from.
        self.where = str(path) if self.path.name == Path(self.name).name else f"{self.name} (kept as {path})"
        self.embed_dim = embed_dim
        self.storage = storage
        self.dtype = None if dtype is None else np.dtype(_STORED.get(dtype, dtype)).newbyteorder("<")
        self.extension = extension
        self._text_extension, _, self._field = texts.partition(":")
        self._data = _open(self.path)
        if info is not None and len(self._data) != info.bytes:
            raise InputError(f"{self.where}: has {len(self._data)} bytes, {SHARDS} lists {info.bytes}")
        self.keys: list[str] = []
        # offset and size in the tar, by key
        self._metas: dict[str, tuple[int, int]] = {}
        self._texts: dict[str, tuple[int, int]] = {}
        self._npys: list[tuple[int, int]] = []
        self._offsets: list[int] = []
        lengths = []
        try:
            members = read_members(self._data, self.where)
        except OSError as error:
            raise InputError(f"{self.where}: cannot be read: {error.strerror}") from None
        for name, offset, size, head in zip(*members, strict=True):
            key, kind = _split(name)
            if kind == extension:
                length = _length(head, size, self.embed_dim, self.dtype)
                begin = HEAD
                if length is None:
                    begin, length = self._check(key, offset, size, head)
                self.keys.append(key)
                self._npys.append((offset, size))
                self._offsets.append(offset + begin)
                lengths.append(length)
            elif kind == "json":
                self._metas[key] = (offset, size)
            elif kind == self._text_extension:
                self._texts[key] = (offset, size)
        self.lengths = np.array(lengths, np.int64)
        self._check_counts(info)

    def __len__(self) -> int:
        """Documents."""
        return len(self.keys)

    def concepts(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Concepts `start` to `stop` of the document, all by default: [n, embed_dim], raw space.

        In the stored dtype, or that of what it stands for (see lcm_ds.data.quantization). Raises InputError.
        """
        first, last, _ = slice(start, stop).indices(int(self.lengths[document]))
        assert self.embed_dim is not None
        assert self.dtype is not None
        out = np.empty((last - first, self.embed_dim), self.dtype if self.storage is None else self.storage.dtype)
        self.read_into(out, document, first)
        return out

    def read_into(self, out: np.ndarray, document: int, start: int) -> None:
        """Read concepts of the document, from `start` on, to `out` [n, embed_dim], raw space, in `out`'s dtype.

        out: contiguous. Raises InputError where the file cannot be read, or is not as long as it was.
        """
        assert self.dtype is not None
        offset = self._offsets[document] + start * out.shape[1] * self.dtype.itemsize
        same = out.dtype == self.dtype and self.storage is None
        stored = out if same else np.empty(out.shape, self.dtype)
        try:
            whole = self._data.read_into(stored, offset)
        except OSError as error:
            raise InputError(f"{self.where}: {self.keys[document]}: cannot be read: {error.strerror}") from None
        if not whole:
            raise InputError(f"{self.where}: {self.keys[document]}: is cut off: the file has become shorter")
        if self.storage is not None:
            self.storage.decode(stored, out)
        elif not same:
            out[...] = stored

    def members(self, document: int) -> dict[str, bytes]:
        """The document's files in the tar, by extension."""
        key = self.keys[document]
        found = {self.extension: self._npys[document]}
        for extension, members in (("json", self._metas), (self._text_extension, self._texts)):
            if key in members:
                found[extension] = members[key]
        return {extension: self._data[at : at + size] for extension, (at, size) in found.items()}

    def meta(self, document: int) -> dict[str, Any]:
        """The document's `id`, `source` and `sentences`, and what else its JSON holds.

        A tar made elsewhere may say none of them: they are the key, the shard's name, and no sentences then.
        Raises InputError where the JSON is none, or has not as many sentences as there are concepts.
        """
        key = self.keys[document]
        meta: dict[str, Any] = {"id": key, "source": self.name}
        if key in self._metas:
            at, size = self._metas[key]
            try:
                found = json.loads(self._data[at : at + size])
            except ValueError as error:
                raise InputError(f"{self.where}: {key}.json: not JSON: {error}") from None
            if not isinstance(found, dict) or not isinstance(found.get(self._field, []), list):
                raise InputError(f"{self.where}: {key}.json: has to be an object with a list of {self._field}")
            meta |= found
        sentences = meta.get(self._field) if self._field else self._lines(key)
        count, length = len(sentences or ()), int(self.lengths[document])
        if sentences is not None and count != length:
            raise InputError(f"{self.where}: {key}: has {count} sentences and {length} concepts")
        return meta | {"sentences": sentences or []}

    def _lines(self, key: str) -> list[str] | None:
        """The lines of the document's text; None where it has none."""
        if key not in self._texts:
            return None
        at, size = self._texts[key]
        try:
            text = self._data[at : at + size].decode("utf-8").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.where}: {key}.{self._text_extension}: not UTF-8: {error}") from None
        return text.split("\n") if text else []

    def _check(self, key: str, offset: int, size: int, head: bytes) -> tuple[int, int]:
        """After how many bytes the document's numbers begin, and how many concepts they are."""
        where = f"{self.where}: {key}.{self.extension}"
        # The length of the header: two bytes in version 1 of the format, four after it.
        width = 2 if head[6:7] == b"\1" else 4
        begin = 8 + width + int.from_bytes(head[8 : 8 + width], "little")
        header = head if begin == len(head) <= size else self._data[offset : offset + min(begin, size)]
        try:
            shape, fortran_order, dtype = _npy_header(header)
        except ValueError as error:
            raise InputError(f"{where}: not an .npy file: {error}") from None
        if dtype.hasobject:
            raise InputError(f"{where}: holds pickled objects, which are never loaded; concepts are plain numbers")
        if len(shape) != 2 or (fortran_order and 1 not in shape):
            raise InputError(f"{where}: has shape {list(shape)}; concepts are [n, embed_dim], row by row")
        self.dtype, self.embed_dim = self.dtype or dtype, self.embed_dim or shape[1]
        if dtype != self.dtype:
            raise InputError(f"{where}: is {dtype}, its dataset is {self.dtype}")
        if shape[1] != self.embed_dim:
            raise InputError(f"{where}: has embed_dim {shape[1]}, its dataset {self.embed_dim}")
        if begin + shape[0] * shape[1] * dtype.itemsize != size:
            raise InputError(f"{where}: has {size} bytes, which is not what {list(shape)} {dtype} takes")
        return begin, shape[0]

    def _check_counts(self, info: ShardInfo | None) -> None:
        if len(keys := set(self.keys)) != len(self.keys):
            twice = next(key for i, key in enumerate(self.keys) if key in self.keys[:i])
            raise InputError(f"{self.where}: {twice}: two documents have this key")
        if orphans := self._metas.keys() - keys:
            raise InputError(f"{self.where}: {min(orphans)}: has a .json and no .{self.extension}")
        found = (len(self), int(self.lengths.sum()))
        if info is not None and found != (info.documents, info.concepts):
            raise InputError(
                f"{self.where}: has {found[0]} documents with {found[1]} concepts, "
                f"{SHARDS} lists {info.documents} with {info.concepts}"
            )


def open_shard(dataset: Dataset, index: int, whole: bool = False) -> Shard:
    """Shard `index` of a dataset, checked against it; fetched first where it is elsewhere.

    whole: nearly all of it will be read, in any order. Raises InputError.
    """
    if dataset.checksums and dataset.is_elsewhere(index):
        with dataset.shard_file(index) as path:
            rotten = _checksum(path) != dataset.shards[index].sha256
        if rotten:  # since it came
            assert dataset.cache is not None
            dataset.cache.forget(dataset.shards[index].sha256)
    with dataset.shard_file(index) as path:
        info = dataset.info
        if whole and not dataset.checksums:
            with suppress(OSError):  # said below
                read_ahead(path)
        listed, storage = dataset.shards[index], dataset.storage
        shard = Shard(path, listed, info.embed_dim, info.dtype, storage, info.extension, info.texts)
        if dataset.checksums:
            _compare(shard, _checksum(path), dataset.shards[index])
    return shard


def open_shard_once(dataset: Dataset, index: int) -> Shard:
    """`open_shard` for one that nobody comes back to: where it was fetched, its file goes when the `Shard` does."""
    with _keeping_nothing(dataset) as passing:
        return open_shard(passing, index)  # it stays readable when its name is gone


def verify(dataset: Dataset, threads: int = 4) -> Iterator[list[str]]:
    """Read every shard again, a few at a time: for each, in order, what is wrong with it.

    Its checksum is compared, and every document: its array, its JSON, and as many sentences as concepts.
    """

    def check(index: int) -> list[str]:
        mistakes = Collector()
        with mistakes, _keeping_nothing(replace(dataset, checksums=False)) as passing:
            shard = open_shard(passing, index)
            with mistakes:
                _compare(shard, _sha256(shard), dataset.shards[index])
            for document in range(len(shard)):
                with mistakes:
                    shard.meta(document)
        return mistakes.mistakes

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(check, range(len(dataset.shards)))


@contextmanager
def _keeping_nothing(dataset: Dataset) -> Iterator[Dataset]:
    """The dataset, its shards that are elsewhere fetched anew into a folder that lasts as long as the context."""
    if dataset.cache is None:  # all are on this machine
        yield dataset
        return
    Path(dataset.cache.folder).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=dataset.cache.folder, prefix="shard-") as folder:
        yield replace(dataset, cache=Cache(folder))


def _sha256(shard: Shard) -> str:
    try:
        return sha256_of(shard.path)
    except OSError as error:
        raise InputError(f"{shard.where}: cannot be read: {error.strerror}") from None


def _compare(shard: Shard, sha256: str, info: ShardInfo) -> None:
    if sha256 != info.sha256:
        raise InputError(f"{shard.where}: has sha256 {sha256}, {SHARDS} lists {info.sha256}: its bytes have changed")


def _checksum(path: Path) -> str:
    """The file's sha256, read once a process: epochs come back to the same shards."""
    found = path.stat()
    return _checksum_of(path, found.st_ino, found.st_mtime_ns)


@lru_cache(maxsize=1 << 18)
def _checksum_of(path: Path, inode: int, changed: int) -> str:
    return sha256_of(path)


def _open(path: Path) -> OpenFile:
    try:
        file = OpenFile(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if not len(file):
        raise InputError(f"{path}: is empty")
    return file


def _split(name: str) -> tuple[str, str]:
    """Key and extension as WebDataset has them: cut at the first dot after the last slash."""
    if "/" not in name:
        key, _, kind = name.partition(".")
        return (key, kind.lower()) if key else (name, "")
    dot = name.find(".", name.rfind("/") + 1)
    return (name[:dot], name[dot + 1 :].lower()) if dot > 0 else (name, "")


@lru_cache(maxsize=1 << 14)  # documents of the same length have the same header
def _length(head: bytes, size: int, embed_dim: int | None, dtype: np.dtype | None) -> int | None:
    """How many concepts an array holds, by the first HEAD of its bytes; None where it has to be looked at closely."""
    width = 2 if head[6:7] == b"\1" else 4
    if embed_dim is None or dtype is None or 8 + width + int.from_bytes(head[8 : 8 + width], "little") != HEAD:
        return None
    try:
        shape, fortran_order, found = _npy_header(head)
    except ValueError:
        return None
    usual = len(shape) == 2 and shape[1] == embed_dim and found == dtype and not fortran_order
    return shape[0] if usual and HEAD + shape[0] * embed_dim * dtype.itemsize == size else None


def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether column by column, and dtype. Raises ValueError."""
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format is not read here")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        return read(file)
    except TokenError as error:
        raise ValueError(f"its header cannot be read: {error}") from None
