"""Writing shards: documents → plain tars that any WebDataset reader opens, the same bytes for the same documents.

A shard gets its name only once it is complete and synced; `lcm_ds.data.format.commit` then makes it part of the
dataset.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import uuid
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lcm_ds.data.format import ShardInfo, record_path
from lcm_ds.data.quantization import Quantization
from lcm_ds.data.shard import SOURCE_SENTENCES, TARGET_SENTENCES, Shard
from lcm_ds.data.tar import MOST_OCTAL
from lcm_ds.errors import InputError
from lcm_ds.files import sha256_of, sync, write_whole

_BUFFER_BYTES = 1 << 18
# WebDataset splits key and extension at the first dot; names of this kind and length fit a plain ustar header.
_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")


@dataclass(frozen=True)
class Document:
    """One sample of a shard: the sentences of a text and their concepts, the end-of-text last in both."""

    key: str  # unique in its shard; letters, digits, "_" and "-"
    id: str  # in its source
    source: str
    sentences: list[str] | None  # None: they are not known
    concepts: np.ndarray  # [n, embed_dim], raw space, any float dtype
    given: int | None = None  # of a supervised document: how many concepts are its source, the rest being its target
    language: str | None = None  # in a dataset of several: its code of SONAR
    group: str | None = None  # what it shares with other documents (source.group_column)


def write_shard(
    folder: str | Path,
    name: str,
    documents: Iterable[Document],
    dtype: str = "float16",
    quantization: Quantization | None = None,
) -> ShardInfo:
    """Write a shard; `commit` then adds it to its dataset.

    Args:
        folder: The dataset's folder.
        name: The shard's file name.
        documents: What it holds.
        dtype: How concepts are stored.
        quantization: How int8 stores them.

    Returns:
        The shard's line for `commit`.

    Raises:
        InputError: A document's key is invalid or taken, it is empty, its sentences and concepts differ in number, its
            embed_dim is not that of the first document, or its concepts are not finite (in `dtype`). No shard is left.
    """
    with ShardWriter(folder, name, dtype, quantization) as writer:
        for document in documents:
            writer.add(document)
        return writer.finish()


def copy_shard(shard: Shard, documents: Iterable[int], folder: str | Path, name: str) -> ShardInfo:
    """Write some documents of a shard as the shard `folder`/`name`, byte for byte; returns its line for `commit`."""
    with ShardWriter(folder, name, extension=shard.extension) as writer:
        for document in documents:
            writer.add_members(shard.keys[document], shard.members(document), shard.supervised)
        return writer.finish()


class ShardWriter(AbstractContextManager["ShardWriter"]):
    """Writes a shard document by document; without `finish` nothing is left of it."""

    def __init__(
        self,
        folder: str | Path,
        name: str,
        dtype: str = "float16",
        quantization: Quantization | None = None,
        extension: str = "npy",
    ) -> None:
        """Open its file; the arguments are those of `write_shard`.

        Args:
            folder: The dataset's folder.
            name: The shard's file name.
            dtype: How concepts are stored.
            quantization: How int8 stores them.
            extension: Of the members that hold concepts.
        """
        self._target = Path(folder) / name
        self._dtype, self._quantization, self._extension = dtype, quantization, extension
        self._keys: set[str] = set()
        self._embed_dim: int | None = None
        self._supervised: set[bool] = set()
        # A name that no other process has, so that two of them never write one file.
        self._partial = self._target.with_name(f"{self._target.name}.{uuid.uuid4().hex}.partial")
        self._file = self._partial.open("wb", buffering=_BUFFER_BYTES)
        self._bytes = 0

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # a full disk has been reported
            self._file.close()
        self._partial.unlink(missing_ok=True)

    def add(self, document: Document, finite: bool = False) -> None:
        """Write a document; finite: whether that is known of its concepts. Raises InputError as `write_shard` does."""
        location = f"{self._target}: document {document.key} ({document.id})"
        stored = _stored(document, self._dtype, self._quantization, self._embed_dim, location, finite)
        if document.key in self._keys:
            raise InputError(f"{location}: its key is there already")
        self._keys.add(document.key)
        self._embed_dim = stored.shape[1]
        self._member(f"{document.key}.json", _meta(document))
        self._member(f"{document.key}.npy", _npy_header(stored.shape, stored.dtype.str), stored.reshape(-1).data)
        self._supervised.add(document.given is not None)

    def add_members(self, key: str, files: dict[str, bytes], supervised: bool) -> None:
        """Write a document as its files, by extension."""
        for extension, data in sorted(files.items()):
            self._member(f"{key}.{extension}", data)
        self._supervised.add(supervised)

    def _member(self, name: str, *data: bytes | memoryview) -> None:
        """Write a member of the tar, byte for byte as webdataset's TarWriter does, and faster.

        Time, owner and mode are fixed, so that a shard's bytes are a function of its documents.
        """
        size = sum(memoryview(piece).nbytes for piece in data)
        header, padding = _tar_header(name, size), bytes(-size % tarfile.BLOCKSIZE)
        for piece in (header, *data, padding):
            self._file.write(piece)
        self._bytes += len(header) + size + len(padding)

    def finish(self) -> ShardInfo:
        """Sync the tar and write its record in the index; only then has it its name. Returns its line for `commit`."""
        target = self._target
        end = 2 * tarfile.BLOCKSIZE
        self._file.write(bytes(end + -(self._bytes + end) % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        supervised = self._supervised == {True}
        shard = Shard(self._partial, extension=self._extension, supervised=supervised)
        size, sha256 = self._partial.stat().st_size, sha256_of(self._partial)
        info = ShardInfo(target.name, len(shard), int(shard.lengths.sum()), size, sha256)
        write_whole(record_path(target.parent, target.name), shard.index_record())
        os.replace(self._partial, target)
        sync(target.parent)
        return info


def _stored(
    document: Document,
    dtype: str,
    quantization: Quantization | None,
    embed_dim: int | None,
    location: str,
    finite: bool,
) -> np.ndarray:
    """The document's concepts as they are stored: little-endian `dtype` [n, embed_dim].

    Args:
        document: The document.
        dtype: How concepts are stored.
        quantization: How int8 stores them.
        embed_dim: That of the documents before it.
        location: For messages.
        finite: Whether its concepts are known to be finite.

    Raises:
        InputError: As `write_shard` does.
    """
    if not _KEY.fullmatch(document.key) or document.key.startswith("__"):
        raise InputError(f"{location}: a key is 1 to 80 letters, digits, _ or -, and does not begin with __")
    concepts = np.asarray(document.concepts)
    if concepts.ndim != 2 or 0 in concepts.shape or concepts.dtype.kind != "f":
        raise InputError(
            f"{location}: concepts have to be floats [n, embed_dim], n ≥ 1; these are {concepts.dtype} {concepts.shape}"
        )
    if embed_dim is not None and concepts.shape[1] != embed_dim:
        raise InputError(f"{location}: embed_dim is {concepts.shape[1]}, that of the documents before it {embed_dim}")
    sentences = document.sentences
    if sentences is not None and len(sentences) != len(concepts):
        raise InputError(f"{location}: has {len(sentences)} sentences and {len(concepts)} concepts")
    assert (dtype == "int8") == (quantization is not None)
    wide = "float16" if quantization else dtype
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(concepts, np.dtype(wide).newbyteorder("<"))
    if not finite and not (mask := np.isfinite(stored)).all():
        bad = int(np.argmin(mask.all(axis=1)))
        shown = "" if sentences is None else f": {sentences[bad][:60]!r}"
        raise InputError(f"{location}: concept {bad} is not finite{_overflow(concepts[bad], wide)}{shown}")
    return stored if quantization is None else quantization.encode(concepts)


def _overflow(concept: np.ndarray, dtype: str) -> str:
    """For messages: that a finite concept does not fit into `dtype`."""
    largest = float(np.abs(concept).max())
    return f" in {dtype} (it holds ±{largest:.6g})" if np.isfinite(largest) else ""


def _tar_header(name: str, size: int) -> bytes:
    """The header of a member, that of tarfile."""
    if len(name) > tarfile.LENGTH_NAME or not name.isascii() or size > MOST_OCTAL:
        return _header_by_tarfile(name, size)
    template, template_sum = _template()
    header = bytearray(template)
    header[: len(name)] = encoded = name.encode()
    header[124:135] = digits = b"%011o" % size
    header[148:154] = b"%06o" % (template_sum + sum(encoded) + sum(digits))
    return bytes(header)


def _header_by_tarfile(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.PAX_FORMAT, errors="surrogateescape")


@cache
def _template() -> tuple[bytes, int]:
    """A header without name, size and checksum, and the checksum's part of all but name and size."""
    header = bytearray(_header_by_tarfile("", 0))
    header[124:135] = bytes(11)
    return bytes(header), sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")


@lru_cache(maxsize=1 << 12)  # documents of the same length have the same header
def _npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _meta(document: Document) -> bytes:
    meta: dict[str, Any] = {"id": document.id, "source": document.source}
    if document.language is not None:
        meta["language"] = document.language
    if document.group is not None:
        meta["group"] = document.group
    if document.sentences is None:
        assert document.given is None
    elif document.given is None:
        meta["sentences"] = document.sentences
    else:
        meta[SOURCE_SENTENCES] = document.sentences[: document.given]
        meta[TARGET_SENTENCES] = document.sentences[document.given :]
    return json.dumps(meta, ensure_ascii=False).encode("utf-8", errors="replace")
