"""Reading shards: a memory map whose headers are parsed once, and concepts that are views of it.

What disagrees with shards.jsonl or dataset.json, or is not what the format allows, is an error that names shard and
key.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from mmap import ACCESS_READ, mmap
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lcm_ds.data.format import SHARDS, Dataset, ShardInfo
from lcm_ds.data.quantization import Quantization
from lcm_ds.data.tar import Member, read_members
from lcm_ds.errors import Collector, InputError
from lcm_ds.files import sha256_of

_NPY_HEADER = 128  # bytes of an array's header, nearly always


class Shard:
    """The documents of one tar, in its order.

    keys: of each document; lengths: int64, concepts of each document. `info`, `embed_dim` and `dtype` are what the tar
    has to agree with; left out, embed_dim and dtype are those of its first document (None where it has none).
    quantization: what int8 numbers stand for. Raises InputError naming shard and key.
    """

    def __init__(
        self,
        path: str | Path,
        info: ShardInfo | None = None,
        embed_dim: int | None = None,
        dtype: str | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        self.path = Path(path)
        self.name = info.name if info is not None else self.path.name
        # For messages: a shard of the cache has its checksum for a name, which tells nobody where it is from.
        self.where = str(path) if self.path.name == Path(self.name).name else f"{self.name} (kept as {path})"
        self.embed_dim = embed_dim
        self.quantization = quantization
        self.dtype = None if dtype is None else np.dtype(dtype).newbyteorder("<")
        self._data = _map(self.path)
        if info is not None and len(self._data) != info.bytes:
            raise InputError(f"{self.where}: has {len(self._data)} bytes, {SHARDS} lists {info.bytes}")
        self.keys: list[str] = []
        self._metas: dict[str, Member] = {}
        self._npys: list[Member] = []
        self._offsets: list[int] = []
        lengths = []
        known: dict[tuple[bytes, int], tuple[int, int]] = {}
        for member in read_members(self._data, self.where):
            key, extension = _split(member.name)
            if extension == "npy":
                head = self._data[member.offset : member.offset + _NPY_HEADER]
                found = known.get((head, member.size))
                if found is None:
                    found = self._check(key, member)
                    if found[0] == _NPY_HEADER:  # else there may be more to the header than `head`
                        known[head, member.size] = found
                self.keys.append(key)
                self._npys.append(member)
                self._offsets.append(member.offset + found[0])
                lengths.append(found[1])
            elif extension == "json":
                self._metas[key] = member
        self.lengths = np.array(lengths, np.int64)
        self._check_counts(info)

    def __len__(self) -> int:
        """Documents."""
        return len(self.keys)

    def concepts(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Concepts `start` to `stop` of the document, all by default: [n, embed_dim], raw space.

        In the stored dtype a read-only view of the memory map; float16 where they are stored in 8 bits.
        """
        first, last, _ = slice(start, stop).indices(int(self.lengths[document]))
        assert self.embed_dim is not None
        assert self.dtype is not None
        offset = self._offsets[document] + first * self.embed_dim * self.dtype.itemsize
        flat = np.frombuffer(self._data, self.dtype, (last - first) * self.embed_dim, offset)
        stored = flat.reshape(last - first, self.embed_dim)
        return stored if self.quantization is None else self.quantization.decode(stored)

    def read_into(self, out: np.ndarray, document: int, start: int) -> None:
        """Copy concepts of the document, from `start` on, to `out` [n, embed_dim], raw space, in `out`'s dtype."""
        assert self.dtype is not None
        flat = out.shape[0] * out.shape[1]
        offset = self._offsets[document] + start * out.shape[1] * self.dtype.itemsize
        stored = np.frombuffer(self._data, self.dtype, flat, offset).reshape(out.shape)
        if self.quantization is None:
            out[...] = stored
        else:
            self.quantization.decode(stored, out)

    def members(self, document: int) -> dict[str, bytes]:
        """The document's files in the tar, by extension."""
        key = self.keys[document]
        found = {"npy": self._npys[document]}
        if key in self._metas:
            found["json"] = self._metas[key]
        return {name: bytes(self._data[m.offset : m.offset + m.size]) for name, m in found.items()}

    def meta(self, document: int) -> dict[str, Any]:
        """The document's `id`, `source` and `sentences`, and what else its JSON holds.

        A tar made elsewhere may say none of them: they are the key, the shard's name, and no sentences then.
        Raises InputError where the JSON is none, or has not as many sentences as there are concepts.
        """
        key = self.keys[document]
        meta = {"id": key, "source": self.name, "sentences": []}
        member = self._metas.get(key)
        if member is None:
            return meta
        try:
            found = json.loads(self._data[member.offset : member.offset + member.size])
        except ValueError as error:
            raise InputError(f"{self.where}: {key}.json: not JSON: {error}") from None
        if not isinstance(found, dict) or not isinstance(found.get("sentences", []), list):
            raise InputError(f"{self.where}: {key}.json: has to be an object with a list of sentences")
        count, length = len(found.get("sentences", [])), int(self.lengths[document])
        if count != length and "sentences" in found:
            raise InputError(f"{self.where}: {key}: has {count} sentences and {length} concepts")
        return meta | found

    def _check(self, key: str, member: Member) -> tuple[int, int]:
        """After how many bytes the document's numbers begin, and how many concepts they are."""
        where = f"{self.where}: {key}.npy"
        # The length of the header: two bytes in version 1 of the format, four after it.
        head = self._data[member.offset : member.offset + min(12, member.size)]
        width = 2 if head[6:7] == b"\1" else 4
        size = 8 + width + int.from_bytes(head[8 : 8 + width], "little")
        header = self._data[member.offset : member.offset + min(size, member.size)]
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
        if size + shape[0] * shape[1] * dtype.itemsize != member.size:
            raise InputError(f"{where}: has {member.size} bytes, which is not what {list(shape)} {dtype} takes")
        return size, shape[0]

    def _check_counts(self, info: ShardInfo | None) -> None:
        if len(keys := set(self.keys)) != len(self.keys):
            twice = next(key for i, key in enumerate(self.keys) if key in self.keys[:i])
            raise InputError(f"{self.where}: {twice}: two documents have this key")
        if orphans := self._metas.keys() - keys:
            raise InputError(f"{self.where}: {min(orphans)}: has a .json and no .npy")
        found = (len(self), int(self.lengths.sum()))
        if info is not None and found != (info.documents, info.concepts):
            raise InputError(
                f"{self.where}: has {found[0]} documents with {found[1]} concepts, "
                f"{SHARDS} lists {info.documents} with {info.concepts}"
            )


def open_shard(dataset: Dataset, index: int) -> Shard:
    """Shard `index` of a dataset, checked against it; fetched first where it is elsewhere. Raises InputError."""
    shard = Shard(
        dataset.shard_file(index), dataset.shards[index], dataset.embed_dim, dataset.info.dtype, dataset.quantization
    )
    if dataset.checksums:
        _compare(shard, _checksum(shard.path, shard.path.stat().st_mtime_ns), dataset.shards[index])
    return shard


def open_shard_once(dataset: Dataset, index: int) -> Shard:
    """`open_shard` for one that nobody comes back to: where it was fetched, its file goes when the `Shard` does."""
    with _keeping_nothing(dataset) as passing:
        return open_shard(passing, index)  # the map outlives the file's name


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
    if dataset.cache_dir is None:  # all are on this machine
        yield dataset
        return
    Path(dataset.cache_dir).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=dataset.cache_dir, prefix="shard-") as folder:
        yield replace(dataset, cache_dir=folder)


def _sha256(shard: Shard) -> str:
    try:
        return sha256_of(shard.path)
    except OSError as error:
        raise InputError(f"{shard.where}: cannot be read: {error.strerror}") from None


def _compare(shard: Shard, sha256: str, info: ShardInfo) -> None:
    if sha256 != info.sha256:
        raise InputError(f"{shard.where}: has sha256 {sha256}, {SHARDS} lists {info.sha256}: its bytes have changed")


@lru_cache(maxsize=1 << 18)  # once a process and shard: epochs come back to the same ones
def _checksum(path: Path, changed: int) -> str:
    return sha256_of(path)


def _map(path: Path) -> mmap:
    try:
        with path.open("rb") as file:
            return mmap(file.fileno(), 0, access=ACCESS_READ)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{path}: is empty") from None


def _split(name: str) -> tuple[str, str]:
    """Key and extension as WebDataset has them: cut at the first dot after the last slash."""
    dot = name.find(".", name.rfind("/") + 1)
    return (name[:dot], name[dot + 1 :]) if dot > 0 else (name, "")


@lru_cache(maxsize=4096)  # documents of the same length have the same header
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether column by column, and dtype. Raises ValueError."""
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"version {version} of the format is not read here")
