"""The fit of the normaliser: a uniform sample of concepts, and the median and spread of each of its dimensions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from lcm_ds.data.format import EndOfText, ShardInfo, Supervised
from lcm_ds.data.shard import Shard
from lcm_ds.errors import InputError

# The interquartile range of a normal distribution times this is its standard deviation.
IQR_TO_STD = 0.7413


def fit(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """center = median, scale = (75th − 25th percentile) · 0.7413, of each dimension (LCM paper, section 2.4.1).

    samples: [n, embed_dim], raw space. Returns fp32 [embed_dim] twice. Constant dimensions (see `constant`) carry no
    information: they are centred and get scale 1. Raises InputError if there are fewer than two samples, or naming the
    dimensions that vary but have no spread between the percentiles.
    """
    if samples.ndim != 2 or len(samples) < 2:
        raise InputError(f"a normaliser is fitted to samples [n, embed_dim], n ≥ 2; these are {samples.shape}")
    center = np.empty(samples.shape[1], np.float32)
    scale = np.empty(samples.shape[1], np.float32)
    for first in range(0, samples.shape[1], 32):  # a few dimensions at a time: a sample may fill half the memory
        columns = slice(first, first + 32)
        low, middle, high = np.percentile(samples[:, columns].astype(np.float32), (25, 50, 75), axis=0)
        center[columns], scale[columns] = middle, (high - low) * IQR_TO_STD
    scale[constant(samples)] = 1.0
    flat = np.flatnonzero(~(scale > 0))
    if len(flat):
        named = ", ".join(map(str, flat[:20])) + (", …" if len(flat) > 20 else "")
        raise InputError(
            f"{len(flat)} of {len(scale)} dimensions have no spread between the 25th and the 75th percentile of "
            f"{len(samples)} samples, so they cannot be normalised: {named}"
        )
    return center, scale


def constant(samples: np.ndarray) -> np.ndarray:
    """The dimensions [k] that are the same in all samples [n, embed_dim], to rounding: a millionth of the widest range.

    Encoders have them: the last LayerNorm of all-MiniLM-L6-v2 multiplies 3 of its 384 dimensions by nearly 0.
    """
    ranges = samples.max(axis=0).astype(np.float64) - samples.min(axis=0)
    return np.flatnonzero(ranges <= 1e-6 * ranges.max()) if ranges.max() > 0 else np.arange(0)


@dataclass(frozen=True)
class Constants:
    """Which concepts are the same vector in every document and so left out: they would shrink the spread.

    These are the end of text, the last of a document, and the suffix of a supervised source, its last concept.
    """

    end_of_text: bool = False
    source_suffix: bool = False

    @classmethod
    def of(cls, end_of_text: EndOfText | None, supervised: Supervised | None) -> Constants:
        """Those of a dataset, by two keys of its dataset.json."""
        return cls(end_of_text is not None, supervised is not None and supervised.source_suffix is not None)

    @property
    def names(self) -> list[str]:
        """Their keys in dataset.json, for statistics."""
        return [name for name in ("end_of_text", "source_suffix") if getattr(self, name)]

    def others(self, concepts: int, documents: int) -> int:
        """The number of concepts that are not constant, of `concepts` in `documents`."""
        return concepts - documents * len(self.names)

    def leaves(self, shard: Shard, document: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Which concepts are not constant: bool [n], for documents and positions in them, int64 [n]."""
        left = np.ones(len(document), bool)
        if self.end_of_text:
            left &= position != shard.lengths[document] - 1
        if self.source_suffix:
            left &= position != shard.given[document] - 1
        return left


class UniformSample:
    """At most `size` concepts drawn uniformly from all that are added: those with the smallest random numbers.

    What is drawn depends on `seed` and on what was added under which name, not on the order in which it was added.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seed = size, seed
        self.count = 0  # concepts considered
        self._numbers: list[np.ndarray] = []
        self._concepts: list[np.ndarray] = []
        self._kept = 0
        self._below = np.uint64(2**64 - 1)  # concepts with larger numbers cannot be in the sample

    def add(self, name: str, concepts: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Consider concepts [n, embed_dim], or those of them at which `mask`, bool [n], is true.

        `name` is unique among all that is added, as a shard's name is.
        """
        numbers = _numbers(self.seed, name, len(concepts))
        chosen = numbers <= self._below
        if mask is not None:
            chosen &= mask
        self.count += len(concepts) if mask is None else int(mask.sum())
        self._numbers.append(numbers[chosen])
        self._concepts.append(concepts[chosen])
        self._kept += int(chosen.sum())
        if self._kept > 1.25 * self.size:
            self._shrink()

    def concepts(self) -> np.ndarray:
        """The sample, [min(size, count), embed_dim], in order of its random numbers."""
        self._shrink()
        return self._concepts[0]

    def _shrink(self) -> None:
        numbers, concepts = np.concatenate(self._numbers), np.concatenate(self._concepts)
        keep = np.argsort(numbers, kind="stable")[: self.size]
        self._numbers, self._concepts, self._kept = [numbers[keep]], [concepts[keep]], len(keep)
        if len(keep) == self.size:
            self._below = self._numbers[0][-1]


def draw(
    shards: Sequence[ShardInfo],
    open_shard: Callable[[ShardInfo], Shard],
    size: int,
    constants: Constants,
    seed: int = 0,
    threads: int = 4,
) -> np.ndarray:
    """The sample that UniformSample would draw from all shards under their names, read without reading the rest.

    Args:
        shards: all of them.
        open_shard: opens one.
        size: how many concepts.
        constants: which concepts are not drawn.
        seed: of the random numbers.
        threads: shards that are read at a time.

    Returns:
        [min(size, concepts that are not constant), embed_dim]. Which they are depends only on the shards; in memory
        are the sample and 24 bytes for each of it.

    Raises:
        InputError: there are none.
    """
    every = sum(shard.concepts for shard in shards)
    others = constants.others(every, sum(shard.documents for shard in shards))
    # Which concepts are constant is only known once a shard is open, so more are chosen at first: `size` are left, but
    # for a chance of less than one in a million.
    most = size if others == every else round(size * every / max(1, others) + 10 * size**0.5 + 10)
    chosen = np.empty((0, 3), np.uint64)  # random number, shard, position in the shard
    below = np.uint64(2**64 - 1)
    waiting: list[np.ndarray] = []
    kept = 0
    for index, shard in enumerate(shards):
        numbers = _numbers(seed, shard.name, shard.concepts)
        at = np.flatnonzero(numbers <= below)
        waiting.append(np.stack([numbers[at], np.full(len(at), index, np.uint64), at.astype(np.uint64)], axis=1))
        kept += len(at)
        if kept > 0.25 * most or index == len(shards) - 1:
            chosen, waiting, kept = np.concatenate([chosen, *waiting]), [], 0
            chosen = chosen[np.argsort(chosen[:, 0], kind="stable")[:most]]
            below = chosen[-1, 0] if len(chosen) == most else below

    by_shard = np.argsort(chosen[:, 1], kind="stable")
    indices, begins = np.unique(chosen[by_shard, 1], return_index=True)

    def read(shard: ShardInfo, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The entries of the sample in one shard that are not constant, and their concepts."""
        opened = open_shard(shard)
        positions = chosen[entries, 2].astype(np.int64)
        ends = np.cumsum(opened.lengths)
        documents = np.searchsorted(ends, positions, side="right")
        firsts = positions - (ends - opened.lengths)[documents]
        left = constants.leaves(opened, documents, firsts)
        pairs = zip(documents[left].tolist(), firsts[left].tolist(), strict=True)
        read = [opened.concepts(document, first, first + 1) for document, first in pairs]
        return entries[left], np.concatenate(read) if read else np.empty((0, opened.embed_dim or 0))

    sample: np.ndarray | None = None
    left = np.zeros(len(chosen), bool)
    groups = np.split(by_shard, begins[1:])
    with ThreadPoolExecutor(threads) as pool:
        samples = pool.map(read, (shards[int(index)] for index in indices), groups)
        for entries, concepts in samples:
            if sample is None and len(concepts):
                sample = np.empty((len(chosen), concepts.shape[1]), concepts.dtype)
            if sample is not None:
                sample[entries], left[entries] = concepts, True
    if sample is None:
        raise InputError("there are no concepts to fit a normaliser to")
    return sample if left.all() and len(sample) <= size else sample[left][:size]  # without a copy of all


def _numbers(seed: int, name: str, count: int) -> np.ndarray:
    """uint64 [count]: the random numbers of the concepts added under a name."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(digest, np.uint64)).random_raw(count)
