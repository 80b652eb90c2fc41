"""`lcm-ds export-data`: a dataset as parquet in the columns that Meta's code writes and reads.

Ends of text and suffixes of supervised sources are left out, since that code adds them when it loads a dataset (its
`source_suffix_text`). What `lcm-ds adopt` needs to restore them is in the metadata of the file, with the description of
the concepts.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lcm_ds.adopt.columns import EMBEDDING_SUFFIX, GROUP, METADATA
from lcm_ds.adopt.lists import use_system_allocator
from lcm_ds.data.format import Dataset, open_dataset
from lcm_ds.data.remote.cache import Cache
from lcm_ds.data.shard import Shard, open_shard_once
from lcm_ds.errors import InputError
from lcm_ds.files import sync

COLUMN, SOURCE_COLUMN, TARGET_COLUMN = "text_sentences", "prompt_sentences", "answer_sentences"
GROUP_BYTES = 32 << 20  # of the concepts of a row group, which are in memory


class _Rows(NamedTuple):
    """Documents of one row group."""

    ids: list[str]
    sources: list[str]
    groups: list[str | None]
    columns: list[_Column]  # one, or source and target


class _Column(NamedTuple):
    """The sentences and concepts of documents, one document after the other."""

    offsets: np.ndarray  # int32 [documents + 1]: where each document begins
    sentences: list[str] | None
    concepts: np.ndarray  # float32 [concepts, embed_dim], raw space


def export_data(path: str | Path, output: str | Path) -> None:
    """Write a dataset as one parquet file.

    Args:
        path: The dataset, a folder or a URL.
        output: The file, which must not exist.

    Raises:
        InputError: The dataset cannot be read, or the file not be written.
    """
    output = Path(output)
    if output.exists():
        raise InputError(f"{output}: is there already; choose a new file")
    if not output.absolute().parent.is_dir():
        raise InputError(f"{output}: has to be a file in a folder that is there")
    use_system_allocator()
    partial = output.with_name(f"{output.name}.partial")
    with tempfile.TemporaryDirectory(prefix="lcm-ds-") as cache:
        dataset = open_dataset(path, Cache(cache))
        try:
            documents = _write(dataset, partial)
            sync(partial)
            os.replace(partial, output)
            sync(output.absolute().parent)
        except OSError as error:
            raise InputError(f"{output}: cannot be written: {error.strerror or error}") from None
        finally:
            partial.unlink(missing_ok=True)
    print(f"{output}: {documents:,} documents of {path}, {output.stat().st_size:,} bytes")


def _write(dataset: Dataset, path: Path) -> int:
    """Write the file, and return the number of documents."""
    import pyarrow
    import pyarrow.parquet

    names = [COLUMN] if dataset.info.supervised is None else [SOURCE_COLUMN, TARGET_COLUMN]
    concept = pyarrow.list_(pyarrow.float32(), dataset.embed_dim)
    first = open_shard_once(dataset, next(index for index, shard in enumerate(dataset.shards) if shard.documents))
    worded = bool(first.meta(0)["sentences"])
    fields = [("id", pyarrow.string()), ("source", pyarrow.string())]
    fields += [(GROUP, pyarrow.string())] if dataset.has_groups else []
    for name in names:
        fields += [(name, pyarrow.list_(pyarrow.string()))] if worded else []
        fields += [(name + EMBEDDING_SUFFIX, pyarrow.list_(concept))]
    schema = pyarrow.schema(fields, metadata={METADATA: json.dumps(_described(dataset, first))})
    # Concepts neither repeat nor shrink: a dictionary and compression would only take time.
    texts = [
        *(name for name, _ in fields if name in ("id", "source", GROUP)),
        *(f"{name}.list.element" for name in names if worded),
    ]
    compression = dict.fromkeys(texts, "ZSTD")
    compression |= {f"{name}{EMBEDDING_SUFFIX}.list.element.list.element": "NONE" for name in names}
    count = 0
    options: dict[str, Any] = {"compression": compression, "use_dictionary": texts, "write_statistics": ["id"]}
    with pyarrow.parquet.ParquetWriter(path, schema, **options) as writer:
        for rows in _row_groups(dataset, worded):
            writer.write_table(_table(rows, schema), row_group_size=max(1, len(rows.ids)))
            count += len(rows.ids)
            del rows  # before the next ones are read
            pyarrow.default_memory_pool().release_unused()  # what is free between the chunks that the writer keeps
    return count


def _table(rows: _Rows, schema: Any) -> Any:
    """The documents as an Arrow table."""
    import pyarrow

    arrays = [pyarrow.array(rows.ids), pyarrow.array(rows.sources)]
    if GROUP in schema.names:
        arrays.append(pyarrow.array(rows.groups, pyarrow.string()))
    for column in rows.columns:
        if column.sentences is not None:
            arrays.append(pyarrow.ListArray.from_arrays(column.offsets, pyarrow.array(column.sentences)))
        concept = schema.field(len(arrays)).type.value_type
        vectors = pyarrow.FixedSizeListArray.from_arrays(column.concepts.reshape(-1), type=concept)
        arrays.append(pyarrow.ListArray.from_arrays(column.offsets, vectors))
    return pyarrow.table(arrays, schema=schema)


def _row_groups(dataset: Dataset, worded: bool) -> Iterator[_Rows]:
    """The documents in order of the shards, as many at a time as have GROUP_BYTES of concepts."""
    most = max(1, GROUP_BYTES // (4 * dataset.embed_dim))
    # Of all row groups: what is allocated for each of them is not freed as it was, so that memory would grow.
    buffers = [
        np.empty((most, dataset.embed_dim), np.float32) for _ in range(1 if dataset.info.supervised is None else 2)
    ]
    for index in range(len(dataset.shards)):
        shard = open_shard_once(dataset, index)
        ends = np.concatenate([[0], np.cumsum(shard.lengths)])
        first = 0
        while first < len(shard):
            last = max(first + 1, int(np.searchsorted(ends, ends[first] + most, side="right")) - 1)
            yield _rows(dataset, shard, range(first, last), worded, buffers)
            first = last


def _rows(dataset: Dataset, shard: Shard, documents: range, worded: bool, buffers: list[np.ndarray]) -> _Rows:
    """Some documents of a shard, without ends of text and suffixes. Raises InputError if one has no sentences.

    Args:
        dataset: Of the shard.
        shard: Open.
        documents: Their numbers.
        worded: Whether documents have sentences.
        buffers: For the concepts of each column, float32 [n, embed_dim]; a longer document gets one of its own.
    """
    info = dataset.info
    suffixed = info.supervised is not None and info.supervised.source_suffix is not None
    ids, sources, groups = [], [], []
    texts: list[list[str]] = [[] for _ in range(1 if info.supervised is None else 2)]
    ranges: list[list[tuple[int, int, int]]] = [[] for _ in texts]  # document, first and last concept
    for document in documents:
        meta = shard.meta(document)
        sentences = meta["sentences"]
        if bool(sentences) != worded:
            raise InputError(f"{shard.location}: {shard.keys[document]}: has {len(sentences)} sentences, unlike others")
        ids.append(_text(meta["id"]))
        sources.append(_text(meta["source"]))
        groups.append(_text(meta["group"]) if "group" in meta else None)
        length = int(shard.lengths[document])
        end = info.end_of_text is not None and (not sentences or sentences[-1] == info.end_of_text.text)
        bounds = [(0, length - end)]
        if info.supervised is not None:
            given = int(shard.given[document])
            bounds = [(0, given - suffixed), (given, length - end)]
        for own, places, (begin, stop) in zip(texts, ranges, bounds, strict=True):
            own += map(_text, sentences[begin:stop])
            places.append((document, begin, stop))
    columns = []
    for own, places, buffer in zip(texts, ranges, buffers, strict=True):
        offsets = np.concatenate([[0], np.cumsum([stop - begin for _, begin, stop in places])]).astype(np.int32)
        count = int(offsets[-1])
        concepts = buffer[:count] if count <= len(buffer) else np.empty((count, dataset.embed_dim), np.float32)
        for (document, begin, _), at, until in zip(places, offsets[:-1], offsets[1:], strict=True):
            shard.read_into(concepts[at:until], document, begin)
        columns.append(_Column(offsets, own if worded else None, concepts))
    return _Rows(ids, sources, groups, columns)


def _described(dataset: Dataset, first: Shard) -> dict[str, Any]:
    """What adopt reads: the concepts' part of dataset.json, and the suffix's concept as the first document has it."""
    info = dataset.info
    keys = {"encoder", "language", "splitter", "end_of_text", "quantization", "dtype"}
    described = info.model_dump(include=keys, exclude_none=True)
    if info.supervised is not None:
        described["supervised"] = True
        if (text := info.supervised.source_suffix) is not None:
            at = int(first.given[0]) - 1
            vector = np.empty((1, dataset.embed_dim), np.float32)
            first.read_into(vector, 0, at)
            described["source_suffix"] = {"text": text, "vector": vector[0].tolist()}
    return described


def _text(value: Any) -> str:
    """A string as Arrow takes it: without lone surrogates."""
    return str(value).encode("utf-8", errors="replace").decode()
