"""Lengths and reachable targets of supervised documents, known before a run reads them.

An unsupervised dataset's shards are counted in concepts only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import numpy as np

from lcm_ds.data.format import Dataset
from lcm_ds.data.plan import Source
from lcm_ds.data.shard import open_shard

logger = logging.getLogger(__name__)

THREADS = 4


class Parts(NamedTuple):
    """The documents of a supervised shard."""

    lengths: list[int]  # concepts of each
    given: list[int]  # how many of them are its source


# Of shards whose line in shards.jsonl does not list them, by sha256: read once a process.
_read: dict[str, Parts] = {}


def parts_of(dataset: Dataset) -> list[Parts]:
    """The documents of each shard of a supervised dataset.

    If an earlier version wrote shards.jsonl without them, they are read from the shards, which is logged. Raises
    InputError if one of those cannot be read.
    """
    unknown = [i for i, shard in enumerate(dataset.shards) if shard.lengths is None and shard.sha256 not in _read]
    if unknown:
        logger.warning(
            "%s: shards.jsonl was written by an earlier version: the documents' lengths are read from %d shards",
            dataset.path,
            len(unknown),
        )
        unchecked = replace(dataset, checksums=False)  # they are compared when their concepts are read

        def read(index: int) -> Parts:
            shard = open_shard(unchecked, index)
            return Parts(shard.lengths.tolist(), shard.given.tolist())

        with ThreadPoolExecutor(THREADS) as pool:
            for index, parts in zip(unknown, pool.map(read, unknown), strict=True):
                _read[dataset.shards[index].sha256] = parts
    return [
        _read[shard.sha256] if shard.lengths is None else Parts(shard.lengths, shard.given or [])
        for shard in dataset.shards
    ]


def longest_segment(dataset: Dataset, row_length: int, max_segment: int) -> int:
    """The most concepts of a segment: that of supervised documents fits into a row, which holds complete segments."""
    return max_segment if dataset.info.supervised is None else min(max_segment, row_length)


def source_of(dataset: Dataset, row_length: int, max_segment: int, weight: float = 1.0) -> Source:
    """The dataset as the plan sees it.

    Args:
        dataset: supervised or not.
        row_length: concepts of a row.
        max_segment: concepts of a segment, at most.
        weight: its share of the lanes.

    Returns:
        Its shards' concepts; of a supervised one the lengths of its documents, too.

    Raises:
        InputError: as `parts_of`.
    """
    concepts = [shard.concepts for shard in dataset.shards]
    if dataset.info.supervised is None:
        return Source(concepts, weight)
    lengths = [parts.lengths for parts in parts_of(dataset)]
    return Source(concepts, weight, lengths, longest_segment(dataset, row_length, max_segment))


class TargetReach(NamedTuple):
    """Targets of a supervised dataset."""

    reached: int  # in each epoch
    all: int  # the target parts of its documents, together
    shortest_source: int  # concepts


def target_reach(dataset: Dataset, row_length: int, max_segment: int) -> TargetReach:
    """How many of a supervised dataset's targets an epoch reaches: those in their documents' first segment.

    Later segments have lost their source. Raises InputError as `parts_of`.
    """
    parts = parts_of(dataset)
    lengths, given = (_array(part[i] for part in parts) for i in range(2))
    first = np.maximum(given, 1)  # nothing comes before the first concept of a document
    longest = longest_segment(dataset, row_length, max_segment)
    reached = np.maximum(np.minimum(lengths, longest) - first, 0).sum()
    return TargetReach(int(reached), int(np.maximum(lengths - first, 0).sum()), int(given.min()))


def length_limit(row_length: int, max_segment: int) -> str:
    """The key that limits how long a supervised document may be, with its value."""
    return f"data.row_length {row_length}" if row_length < max_segment else f"data.max_segment {max_segment}"


def missing_targets(dataset: Dataset, row_length: int, max_segment: int) -> str | None:
    """Why a dataset has no targets, as far as that is known before its shards are read; None if it has some.

    Raises InputError as `parts_of`.
    """
    totals = dataset.info.totals
    if totals.documents == totals.concepts:
        return f"{dataset.path}: holds nothing to predict: each of its documents is a single concept"
    if dataset.info.supervised is None:
        return None
    reach = target_reach(dataset, row_length, max_segment)
    if reach.reached:
        return None
    limit = length_limit(row_length, max_segment)
    return (
        f"{dataset.path}: holds nothing to predict: sources have {reach.shortest_source:,} concepts or more, and a "
        f"target is only reached within {limit}; a larger value, or shorter sources, will do"
    )


def _array(lists: Iterable[list[int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(lists), np.int64)
