"""A dataset as the plan sees it, and the reachable targets of supervised documents, known before a run reads them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lcm_ds.data.format import Dataset
from lcm_ds.data.plan import Source
from lcm_ds.errors import InputError

REMOTE_BLOCK_SHARDS = 32  # two blocks are open at a time


def longest_segment(dataset: Dataset, row_length: int, max_segment: int) -> int:
    """The most concepts of a segment: that of supervised documents fits into a row, which holds complete segments."""
    return max_segment if dataset.info.supervised is None else min(max_segment, row_length)


def source_of(
    dataset: Dataset,
    row_length: int,
    max_segment: int,
    weight: float = 1.0,
    shuffle_shards: int | None = None,
    streams: int = 1,
) -> Source:
    """An indexed dataset as the plan sees it.

    Args:
        dataset: supervised or not.
        row_length: concepts of a row.
        max_segment: concepts of a segment, at most.
        weight: its share of the lanes.
        shuffle_shards: shards of a block; None for the default.
        streams: that its shards and lanes are dealt to.

    Returns:
        The source.
    """
    assert dataset.index is not None
    return Source(
        [shard.concepts for shard in dataset.shards],
        [shard.documents for shard in dataset.shards],
        dataset.index.lengths,
        longest_segment(dataset, row_length, max_segment),
        weight,
        packs=dataset.info.supervised is not None,
        shuffle_shards=block_shards(dataset, shuffle_shards),
        streams=streams,
    )


def block_shards(dataset: Dataset, shuffle_shards: int | None) -> int | None:
    """Shards of a block: as the config says, or for a remote dataset few enough to be fetched before a run begins."""
    return REMOTE_BLOCK_SHARDS if shuffle_shards is None and dataset.any_remote else shuffle_shards


class TargetReach(NamedTuple):
    """Targets of a supervised dataset."""

    reached: int  # in each epoch
    all: int  # the target parts of its documents, together
    shortest_source: int  # concepts


def target_reach(dataset: Dataset, row_length: int, max_segment: int) -> TargetReach:
    """How many of a supervised, indexed dataset's targets an epoch reaches: those in their documents' first segment.

    Later segments have lost their source. Raises InputError if the index is damaged, or a document has no source.
    """
    index = dataset.index
    assert index is not None
    shards = range(len(dataset.shards))
    lengths = np.concatenate([index.lengths(shard) for shard in shards]).astype(np.int64)
    given = np.concatenate([index.given(shard) for shard in shards]).astype(np.int64)
    if not given.all():
        raise InputError(f"{dataset.path}: has documents without a source, though it is supervised")
    longest = longest_segment(dataset, row_length, max_segment)
    reached = np.maximum(np.minimum(lengths, longest) - given, 0).sum()
    return TargetReach(int(reached), int((lengths - given).sum()), int(given.min()))


def length_limit(row_length: int, max_segment: int) -> str:
    """The key that limits how long a supervised document may be, with its value."""
    return f"data.row_length {row_length}" if row_length < max_segment else f"data.max_segment {max_segment}"


def missing_targets(dataset: Dataset, row_length: int, max_segment: int) -> str | None:
    """Why a dataset has no targets, as far as that is known before its shards are read; None if it has some.

    Raises InputError if the index is damaged.
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
