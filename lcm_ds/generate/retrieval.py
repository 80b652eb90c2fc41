"""The sentences of datasets whose concepts are nearest to given concepts: text for encoders that have no decoder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lcm_ds.data.format import Dataset
from lcm_ds.data.shard import open_shard
from lcm_ds.errors import InputError

logger = logging.getLogger(__name__)

BLOCK = 65_536  # concepts that are compared at a time; only memory depends on it
LIMIT = 10_000_000  # concepts to search: seconds to minutes for a dataset of any size


@dataclass(frozen=True)
class Retrieved:
    """The concept of a dataset that is nearest to a query."""

    cosine: float
    text: str  # its sentence; if its shard has no sentences, the document's id and the concept's position
    document: str  # the document's id


@dataclass
class _Block:
    """Concepts of one shard, document by document."""

    dataset: int
    shard: int
    documents: list[int]  # their indices in the shard
    concepts: np.ndarray  # fp32 [n, embed_dim]
    ends: np.ndarray  # of the documents, counted in concepts


def nearest_sentences(concepts: np.ndarray, datasets: Sequence[Dataset], limit: int = LIMIT) -> list[Retrieved]:
    """Find the dataset concept with the highest cosine to each query.

    Args:
        concepts: the queries, [m, embed_dim], raw space.
        datasets: searched in their order; unreadable shards are skipped if their dataset allows it.
        limit: stop after about this many concepts.

    Returns:
        One concept for each query, the first of equals.
    """
    queries = _directions(concepts)
    highest = np.full(len(queries), -np.inf, np.float32)
    sources: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)] * len(queries)
    for block in _blocks(datasets, limit):
        cosines = queries @ _directions(block.concepts).T
        for query, index in enumerate(cosines.argmax(axis=1)):
            if cosines[query, index] > highest[query]:
                highest[query] = cosines[query, index]
                document = int(np.searchsorted(block.ends, index, side="right"))
                start = int(block.ends[document - 1]) if document else 0
                sources[query] = (block.dataset, block.shard, block.documents[document], int(index) - start)
    return [
        _retrieved(datasets[dataset], shard, document, position, float(cosine))
        for cosine, (dataset, shard, document, position) in zip(highest, sources, strict=True)
    ]


def _blocks(datasets: Sequence[Dataset], limit: int) -> Iterator[_Block]:
    """All concepts, in blocks of complete documents of one shard."""
    seen = 0
    for i, dataset in enumerate(datasets):
        for shard in range(len(dataset.shards)):
            if seen >= limit:
                return
            try:
                for block in _blocks_of(dataset, i, shard):
                    yield block
                    seen += len(block.concepts)
            except InputError as error:
                if not dataset.skip_bad:
                    raise
                logger.error("skipped: %s", error)


def _blocks_of(dataset: Dataset, dataset_index: int, shard_index: int) -> Iterator[_Block]:
    shard = open_shard(dataset, shard_index)
    lengths = shard.lengths
    # A document belongs to the block in which it begins.
    blocks = (lengths.cumsum() - lengths) // BLOCK
    for block in np.unique(blocks[lengths > 0]):
        documents = np.flatnonzero((blocks == block) & (lengths > 0)).tolist()
        concepts = np.concatenate([shard.concepts(document) for document in documents]).astype(np.float32)
        yield _Block(dataset_index, shard_index, documents, concepts, lengths[documents].cumsum())


def _retrieved(dataset: Dataset, shard: int, document: int, position: int, cosine: float) -> Retrieved:
    meta = open_shard(dataset, shard).meta(document)
    text = meta["sentences"][position] if meta["sentences"] else f"{meta['id']}, concept {position}"
    return Retrieved(cosine, text, str(meta["id"]))


def _directions(concepts: np.ndarray) -> np.ndarray:
    """Concepts normalised to length 1, fp32; zeros stay zeros."""
    exact = np.asarray(concepts, np.float32)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    return exact / np.maximum(lengths, np.finfo(np.float32).tiny)
