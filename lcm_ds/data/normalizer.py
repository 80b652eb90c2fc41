"""The fit of the normaliser: a uniform sample of concepts, and the median and spread of each of its dimensions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lcm_ds.data.format import ShardInfo
from lcm_ds.data.reader import Shard
from lcm_ds.errors import InputError

# The interquartile range of a normal distribution times this is its standard deviation.
IQR_TO_STD = 0.7413


def fit(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """center = median, scale = (75th − 25th percentile) · 0.7413, of each dimension (LCM paper, section 2.4.1).

    samples: [n, embed_dim], raw space. Returns fp32 [embed_dim] twice. Constant dimensions (see `constant`) carry
    nothing: they are centred and keep their scale of 1. Raises InputError where there are fewer than two samples, or
    where dimensions vary and yet have no spread between the percentiles: they are named.
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


class UniformSample:
    """At most `size` concepts drawn uniformly from all that are added: those with the smallest random numbers.

    What is drawn depends on `seed` and on what was added under which name, not on the order in which it was added.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seed = size, seed
        self.count = 0  # concepts added
        self._numbers: list[np.ndarray] = []
        self._concepts: list[np.ndarray] = []
        self._held = 0
        self._below = np.uint64(2**64 - 1)  # numbers above it are out of the running

    def add(self, name: str, concepts: np.ndarray) -> None:
        """Consider concepts [n, embed_dim]; `name` is unique among all that is added, as a shard's name is."""
        numbers = _numbers(self.seed, name, len(concepts))
        chosen = numbers <= self._below
        self.count += len(concepts)
        self._numbers.append(numbers[chosen])
        self._concepts.append(concepts[chosen])
        self._held += int(chosen.sum())
        if self._held > 1.25 * self.size:
            self._shrink()

    def concepts(self) -> np.ndarray:
        """The sample, [min(size, count), embed_dim], in order of its random numbers."""
        self._shrink()
        return self._concepts[0]

    def _shrink(self) -> None:
        numbers, concepts = np.concatenate(self._numbers), np.concatenate(self._concepts)
        keep = np.argsort(numbers, kind="stable")[: self.size]
        self._numbers, self._concepts, self._held = [numbers[keep]], [concepts[keep]], len(keep)
        if len(keep) == self.size:
            self._below = self._numbers[0][-1]


def draw(
    shards: Sequence[ShardInfo], open_shard: Callable[[ShardInfo], Shard], size: int, seed: int = 0, threads: int = 4
) -> np.ndarray:
    """The concepts that a UniformSample of all shards, each under its name, holds, read without reading the others.

    Returns [min(size, concepts), embed_dim]. Which they are follows from the shards' names and counts alone; in memory
    are the sample and 24 bytes for each of it.
    """
    chosen = np.empty((0, 3), np.uint64)  # random number, shard, position in the shard
    below = np.uint64(2**64 - 1)
    waiting: list[np.ndarray] = []
    held = 0
    for index, shard in enumerate(shards):
        numbers = _numbers(seed, shard.name, shard.concepts)
        at = np.flatnonzero(numbers <= below)
        waiting.append(np.stack([numbers[at], np.full(len(at), index, np.uint64), at.astype(np.uint64)], axis=1))
        held += len(at)
        if held > 0.25 * size or index == len(shards) - 1:
            chosen, waiting, held = np.concatenate([chosen, *waiting]), [], 0
            chosen = chosen[np.argsort(chosen[:, 0], kind="stable")[:size]]
            below = chosen[-1, 0] if len(chosen) == size else below
    if not len(chosen):
        raise InputError("there are no concepts to fit a normaliser to")

    by_shard = np.argsort(chosen[:, 1], kind="stable")
    indices, begins = np.unique(chosen[by_shard, 1], return_index=True)

    def read(shard: ShardInfo, places: np.ndarray) -> np.ndarray:
        """The concepts that are at these places of the sample, all of one shard."""
        opened = open_shard(shard)
        positions = chosen[places, 2].astype(np.int64)
        ends = np.cumsum(opened.lengths)
        documents = np.searchsorted(ends, positions, side="right")
        firsts = positions - (ends - opened.lengths)[documents]
        pairs = zip(documents.tolist(), firsts.tolist(), strict=True)
        return np.concatenate([opened.concepts(document, first, first + 1) for document, first in pairs])

    sample: np.ndarray | None = None
    groups = np.split(by_shard, begins[1:])
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(read, (shards[int(index)] for index in indices), groups)
        for places, concepts in zip(groups, found, strict=True):
            if sample is None:
                sample = np.empty((len(chosen), concepts.shape[1]), concepts.dtype)
            sample[places] = concepts
    assert sample is not None
    return sample


def _numbers(seed: int, name: str, count: int) -> np.ndarray:
    """uint64 [count]: the random numbers of what was added under a name."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(digest, np.uint64)).random_raw(count)
