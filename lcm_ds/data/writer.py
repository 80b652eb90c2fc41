"""Writing shards: documents → plain tars that any WebDataset reader opens, the same bytes for the same documents.

A shard gets its name only once it is complete and synced; `lcm_ds.data.format.commit` then makes it part of the
dataset.
"""

from __future__ import annotations

import io
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from webdataset.writer import TarWriter

from lcm_ds.data.format import ShardInfo, record_path
from lcm_ds.data.quantization import Quantization
from lcm_ds.data.shard import SOURCE_SENTENCES, TARGET_SENTENCES, Shard
from lcm_ds.errors import InputError
from lcm_ds.files import sha256_of, sync, write_whole

# WebDataset splits key and extension at the first dot; names of this kind and length fit a plain ustar header.
_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")


@dataclass(frozen=True)
class Document:
    """One sample of a shard: the sentences of a text and their concepts, the end-of-text last in both."""

    key: str  # unique in its shard; letters, digits, "_" and "-"
    id: str  # in its source
    source: str
    sentences: list[str]
    concepts: np.ndarray  # [n, embed_dim], raw space, any float dtype
    given: int | None = None  # of a supervised document: how many concepts are its source, the rest being its target
    language: str | None = None  # in a dataset of several: its code of SONAR


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
    target = Path(folder) / name

    def samples() -> Iterator[_Sample]:
        keys: set[str] = set()
        embed_dim = None
        for document in documents:
            location = f"{target}: document {document.key} ({document.id})"
            stored = _stored(document, dtype, quantization, embed_dim, location)
            if document.key in keys:
                raise InputError(f"{location}: its key is there already")
            keys.add(document.key)
            embed_dim = stored.shape[1]
            yield _Sample(document.key, {"npy": _npy(stored), "json": _meta(document)}, document.given is not None)

    return _write(target, samples())


def copy_shard(shard: Shard, documents: Iterable[int], folder: str | Path, name: str) -> ShardInfo:
    """Write some documents of a shard as the shard `folder`/`name`, byte for byte; returns its line for `commit`."""
    samples = (_Sample(shard.keys[i], shard.members(i), shard.supervised) for i in documents)
    return _write(Path(folder) / name, samples, shard.extension)


class _Sample(NamedTuple):
    key: str
    files: dict[str, bytes]  # by extension
    supervised: bool


def _write(target: Path, samples: Iterable[_Sample], extension: str = "npy") -> ShardInfo:
    """Write the tar of samples, and beside it its record in the index."""
    # A name that no other process has, so that two of them never write one file.
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
    supervised: set[bool] = set()
    try:
        with partial.open("wb") as file:
            # Times, owner and mode are fixed, so that a shard's bytes are a function of its documents.
            with TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o644) as tar:
                for sample in samples:
                    tar.write({"__key__": sample.key, **sample.files})
                    supervised.add(sample.supervised)
            file.flush()
            os.fsync(file.fileno())
        shard = Shard(partial, extension=extension, supervised=supervised == {True})
        info = ShardInfo(target.name, len(shard), int(shard.lengths.sum()), partial.stat().st_size, sha256_of(partial))
        write_whole(record_path(target.parent, target.name), shard.index_record())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    sync(target.parent)
    return info


def _stored(
    document: Document, dtype: str, quantization: Quantization | None, embed_dim: int | None, location: str
) -> np.ndarray:
    """The document's concepts as they are stored: little-endian `dtype` [n, embed_dim]. Raises InputError."""
    if not _KEY.fullmatch(document.key) or document.key.startswith("__"):
        raise InputError(f"{location}: a key is 1 to 80 letters, digits, _ or -, and does not begin with __")
    concepts = np.asarray(document.concepts)
    if concepts.ndim != 2 or 0 in concepts.shape or concepts.dtype.kind != "f":
        raise InputError(
            f"{location}: concepts have to be floats [n, embed_dim], n ≥ 1; these are {concepts.dtype} {concepts.shape}"
        )
    if embed_dim is not None and concepts.shape[1] != embed_dim:
        raise InputError(f"{location}: embed_dim is {concepts.shape[1]}, that of the documents before it {embed_dim}")
    if len(document.sentences) != len(concepts):
        raise InputError(f"{location}: has {len(document.sentences)} sentences and {len(concepts)} concepts")
    assert (dtype == "int8") == (quantization is not None)
    wide = "float16" if quantization else dtype
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(concepts, np.dtype(wide).newbyteorder("<"))
    finite = np.isfinite(stored).all(axis=1)
    if not finite.all():
        bad = int(np.argmin(finite))
        raise InputError(
            f"{location}: concept {bad} is not finite{_overflow(concepts[bad], wide)}: {document.sentences[bad][:60]!r}"
        )
    return stored if quantization is None else quantization.encode(concepts)


def _overflow(concept: np.ndarray, dtype: str) -> str:
    """For messages: that a finite concept does not fit into `dtype`."""
    largest = float(np.abs(concept).max())
    return f" in {dtype} (it holds ±{largest:.6g})" if np.isfinite(largest) else ""


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _meta(document: Document) -> bytes:
    meta: dict[str, Any] = {"id": document.id, "source": document.source}
    if document.language is not None:
        meta["language"] = document.language
    if document.given is None:
        meta["sentences"] = document.sentences
    else:
        meta[SOURCE_SENTENCES] = document.sentences[: document.given]
        meta[TARGET_SENTENCES] = document.sentences[document.given :]
    return json.dumps(meta, ensure_ascii=False).encode("utf-8", errors="replace")
