"""How well the order of data mixes documents that lie together by topic: lcm-ds, webdataset, mosaicml-streaming.

python benchmarks/mixing.py [--documents 1000000] [--topics 100 10000] [--shards 100 1000] [--rows 16 64 224]

The variance of the mean of a step's concepts, and of ten steps', divided by that of documents in random order: 1 is
perfect. A third of a concept's variance is its topic's, a third its document's, a third its own; consecutive documents
share a topic. Needs no data: the variance follows from how many concepts of each document a step has. A dataset of 5 to
100 concepts a document is read for an epoch in rows of 1024 concepts. mosaicml-streaming's shuffles are measured if it
is installed (pip install mosaicml-streaming).
"""

from __future__ import annotations

import argparse
import importlib.util
import random
from collections.abc import Callable, Iterator

import numpy as np
from webdataset.filters import shuffle

from lcm_ds.data.plan import Plan, Source

ROW_LENGTH, MAX_SEGMENT = 1024, 128
NODES, BLOCK = 1, 4_000_000  # what mosaicml-streaming takes on one node if nothing is set
Steps = Iterator[tuple[np.ndarray, np.ndarray]]  # documents of a step, and how many concepts of each it has


def main() -> None:
    """Print a table for each size of topics and of shards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--topics", type=int, nargs="+", default=[100, 10_000], help="documents of a topic")
    parser.add_argument("--shards", type=int, nargs="+", default=[100, 1000], help="documents of a shard")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 224], help="rows of a step")
    arguments = parser.parse_args()
    lengths = np.random.default_rng(0).integers(5, 101, arguments.documents)
    print(f"one step / ten steps of {', '.join(map(str, arguments.rows))} rows; {arguments.documents:,} documents")
    print("| order | documents of a topic | of a shard | one step | ten steps |\n| --- | ---: | ---: | ---: | ---: |")
    for topic in arguments.topics:
        for shard in arguments.shards:
            for name, steps_of in orders(lengths, shard).items():
                found = [ratios(lengths, topic, steps_of(rows)) for rows in arguments.rows]
                one, ten = (" / ".join(f"{pair[i]:.2f}" for pair in found) for i in range(2))
                print(f"| {name} | {topic:,} | {shard:,} | {one} | {ten} |", flush=True)


def orders(lengths: np.ndarray, shard: int) -> dict[str, Callable[[int], Steps]]:
    """Name → rows of a step → the steps of an epoch."""
    sizes = [len(part) for part in np.array_split(lengths, max(1, len(lengths) // shard))]
    ways: dict[str, Callable[[int], Steps]] = {
        "lcm-ds": lambda rows: planned(lengths, sizes, rows),
        "lcm-ds, shuffle_shards: 32": lambda rows: planned(lengths, sizes, rows, 32),
        "webdataset, buffer of 1000": lambda rows: cut(lengths, buffered(sizes), rows),
    }
    if importlib.util.find_spec("streaming"):
        from streaming.base.shuffle import get_shuffle

        for name in ("py1br", "py1e"):
            ways[f"mosaicml-streaming, {name}"] = lambda rows, name=name: cut(  # type: ignore[misc]
                lengths, get_shuffle(name, np.array(sizes), NODES, 0, 0, BLOCK), rows
            )
    return ways


def planned(lengths: np.ndarray, sizes: list[int], rows: int, shuffle_shards: int | None = None) -> Steps:
    """The steps of a plan."""
    firsts = np.cumsum([0, *sizes])
    parts = [lengths[first : first + size] for first, size in zip(firsts, sizes, strict=False)]
    totals = [int(part.sum()) for part in parts]
    source = Source(totals, sizes, parts.__getitem__, MAX_SEGMENT, shuffle_shards=shuffle_shards)
    plan = Plan([source], 0, rows, ROW_LENGTH, 1)
    assert plan.steps is not None
    for step in range(plan.steps):
        found = plan.segments(step, range(rows))
        yield firsts[found.shard] + found.document, found.stop - found.start


def buffered(sizes: list[int]) -> np.ndarray:
    """webdataset's order: permuted shards through a buffer."""
    firsts = np.cumsum([0, *sizes])
    shards = list(range(len(sizes)))
    random.Random(0).shuffle(shards)
    documents = (int(document) for shard in shards for document in range(firsts[shard], firsts[shard + 1]))
    return np.fromiter(shuffle(1000, initial=1000, rng=random.Random(1))(documents), np.int64, sum(sizes))


def cut(lengths: np.ndarray, order: np.ndarray, rows: int) -> Steps:
    """Steps of documents that are laid end to end."""
    ends = np.cumsum(lengths[order])
    size = rows * ROW_LENGTH
    for begin in range(0, int(ends[-1]), size):
        first, last = np.searchsorted(ends, [begin, min(begin + size, ends[-1]) - 1], side="right")
        documents = order[first : last + 1]
        stops = np.minimum(ends[first : last + 1], begin + size)
        starts = np.maximum(ends[first : last + 1] - lengths[documents], begin)
        yield documents, stops - starts


def ratios(lengths: np.ndarray, topic: int, steps: Steps) -> tuple[float, float]:
    """Of one step and of ten: the variance of their mean over that of documents in random order."""
    permutation = np.random.default_rng(2).permutation(len(lengths))
    topics = np.arange(len(lengths)) // topic
    of_topics = np.bincount(topics, lengths) / lengths.sum()
    sums: dict[int, list[tuple[float, float]]] = {1: [], 10: []}
    complete = list(steps)[:-1]
    for together in sums:
        for first in range(0, len(complete) - together + 1, together):
            documents, counts = (
                np.concatenate(parts) for parts in zip(*complete[first : first + together], strict=True)
            )
            weights = counts / counts.sum()
            # The steps' own documents and counts, and as many in random places: only topics make the difference.
            other = permutation[documents]
            shares = [np.bincount(topics[which], weights, len(of_topics)) - of_topics for which in (documents, other)]
            rest = np.square(weights).sum() + 1 / counts.sum() - 2 / len(lengths)
            sums[together].append(tuple(np.square(share).sum() + rest for share in shares))  # type: ignore[arg-type]
    one, ten = (np.divide(*np.mean(pairs, axis=0)) for pairs in sums.values())
    return float(one), float(ten)


if __name__ == "__main__":
    main()
