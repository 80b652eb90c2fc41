"""The sentences of datasets whose concepts are nearest to given ones: words for encoders that have no decoder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lcm_ds.data.format import Dataset
from lcm_ds.data.shard import open_shard
from lcm_ds.errors import InputError

logger = logging.getLogger(__name__)

BLOCK = 65_536  # concepts compared at a time: a matter of memory alone
LIMIT = 10_000_000  # concepts compared in all: seconds to minutes, whatever the size of the dataset


@dataclass(frozen=True)
class Retrieved:
    """A dataset's concept nearest to one that was looked for."""

    cosine: float
    text: str  # its sentence; where a shard made elsewhere holds none, the document's id and the concept's place
    document: str  # the document's id


@dataclass
class _Block:
    """Concepts of one shard, document by document."""

    dataset: int
    shard: int
    documents: list[int]  # their numbers in the shard
    concepts: np.ndarray  # fp32 [n, embed_dim]
    ends: np.ndarray  # of the documents, counted in concepts


def nearest(concepts: np.ndarray, datasets: Sequence[Dataset], limit: int = LIMIT) -> list[Retrieved]:
    """For each of `concepts` [m, embed_dim], raw space, the one of the datasets with the highest cosine, in fp32.

    Looks through the datasets in their order until about `limit` concepts were seen; of equals it is the first. Bad
    shards are left out where their dataset says so.
    """
    queries = _directions(concepts)
    best = np.full(len(queries), -np.inf, np.float32)
    found: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)] * len(queries)
    for block in _blocks(datasets, limit):
        cosines = queries @ _directions(block.concepts).T
        places = cosines.argmax(axis=1)
        for query, place in enumerate(places):
            if cosines[query, place] > best[query]:
                best[query] = cosines[query, place]
                document = int(np.searchsorted(block.ends, place, side="right"))
                before = int(block.ends[document - 1]) if document else 0
                found[query] = (block.dataset, block.shard, block.documents[document], int(place) - before)
    return [
        _retrieved(datasets[dataset], shard, document, place, float(cosine))
        for cosine, (dataset, shard, document, place) in zip(best, found, strict=True)
    ]


def _blocks(datasets: Sequence[Dataset], limit: int) -> Iterator[_Block]:
    """All concepts, in blocks of whole documents of one shard."""
    seen = 0
    for number, dataset in enumerate(datasets):
        for index in range(len(dataset.shards)):
            if seen >= limit:
                return
            try:
                for block in _blocks_of(dataset, number, index):
                    yield block
                    seen += len(block.concepts)
            except InputError as error:
                if not dataset.skip_bad:
                    raise
                logger.error("skipped: %s", error)


def _blocks_of(dataset: Dataset, number: int, index: int) -> Iterator[_Block]:
    shard = open_shard(dataset, index)
    lengths = shard.lengths
    # the block that a document is in, by where the document begins
    blocks = (lengths.cumsum() - lengths) // BLOCK
    for block in np.unique(blocks[lengths > 0]):
        documents = np.flatnonzero((blocks == block) & (lengths > 0)).tolist()
        some = np.concatenate([shard.concepts(document) for document in documents])
        yield _Block(number, index, documents, some.astype(np.float32), lengths[documents].cumsum())


def _retrieved(dataset: Dataset, shard: int, document: int, place: int, cosine: float) -> Retrieved:
    meta = open_shard(dataset, shard).meta(document)
    text = meta["sentences"][place] if meta["sentences"] else f"{meta['id']}, concept {place}"
    return Retrieved(cosine, text, str(meta["id"]))


def _directions(concepts: np.ndarray) -> np.ndarray:
    """Concepts of length 1, fp32; one of length 0 stays so."""
    exact = np.asarray(concepts, np.float32)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    return exact / np.maximum(lengths, np.finfo(np.float32).tiny)
