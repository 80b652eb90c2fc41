"""The fit of the normaliser: a uniform sample of concepts, and the median and spread of each of its dimensions."""

from __future__ import annotations

import hashlib

import numpy as np

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
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=16).digest()
        numbers = np.random.Philox(key=np.frombuffer(digest, np.uint64)).random_raw(len(concepts))
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
