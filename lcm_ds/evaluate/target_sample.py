"""A uniform sample of targets with every predictor's predictions, for retrieval and for the metrics that need text.

The sample is a function of the dataset: each target has a hash of its document and position, and the smallest hashes
are in the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lcm_ds.baselines.targets import Targets
from lcm_ds.distributed.collectives import Ranks
from lcm_ds.metrics import compare

BLOCK = 2048  # candidates, and predictions, that are compared at a time; only memory depends on it


@dataclass(frozen=True)
class TargetSample:
    """Targets in order of their hashes, [n] of each; raw space, fp32, on the CPU."""

    hashes: Tensor  # int64
    document: Tensor
    position: Tensor
    truth: Tensor  # [n, embed_dim]
    predicted: dict[str, Tensor]  # by predictor, [n, embed_dim]

    def __len__(self) -> int:
        return len(self.hashes)

    def smallest(self, size: int) -> TargetSample:
        """The `size` targets with the smallest hashes."""
        return self.select(self.hashes.sort(stable=True).indices[:size])

    def select(self, index: Tensor | slice) -> TargetSample:
        """A part of the sample."""
        return self._map(lambda values: values[index])

    def to(self, device: torch.device) -> TargetSample:
        """A copy on another device."""
        return self._map(lambda values: values.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> TargetSample:
        predicted = {name: function(values) for name, values in self.predicted.items()}
        hashes, document = function(self.hashes), function(self.document)
        return TargetSample(hashes, document, function(self.position), function(self.truth), predicted)

    @classmethod
    def cat(cls, parts: list[TargetSample]) -> TargetSample:
        """Concatenate samples."""
        return cls(
            torch.cat([part.hashes for part in parts]),
            torch.cat([part.document for part in parts]),
            torch.cat([part.position for part in parts]),
            torch.cat([part.truth for part in parts]),
            {name: torch.cat([part.predicted[name] for part in parts]) for name in parts[0].predicted},
        )


class BottomKSampler:
    """Keeps the `size` targets with the smallest hashes of a stream; holds up to a quarter more in between."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._parts: list[TargetSample] = []
        self._count = 0
        self._threshold = torch.iinfo(torch.int64).max  # larger hashes cannot be in the sample

    def add(self, targets: Targets, truth: Tensor, predicted: Mapping[str, Tensor]) -> None:
        """Consider targets.

        Args:
            targets: n targets.
            truth: [n, embed_dim], raw space.
            predicted: by predictor, [n, embed_dim], raw space.
        """
        hashes = splitmix64(targets.document, targets.position)
        sample = TargetSample(hashes, targets.document, targets.position, truth, dict(predicted))
        kept = (hashes <= self._threshold).nonzero().flatten()
        self._parts.append(sample.select(kept).to(torch.device("cpu")).smallest(self.size))
        self._count += len(self._parts[-1])
        if self._count > 1.25 * self.size:
            self._shrink()

    def gather(self, ranks: Ranks) -> TargetSample:
        """The sample of all ranks, the same on each; a collective call."""
        self._shrink()
        return TargetSample.cat(ranks.gather(self._parts[0])).smallest(self.size)

    def _shrink(self) -> None:
        self._parts = [TargetSample.cat(self._parts).smallest(self.size)]
        self._count = len(self._parts[0])
        if self._count == self.size:
            self._threshold = int(self._parts[0].hashes[-1])


def splitmix64(document: Tensor, position: Tensor) -> Tensor:
    """A non-negative hash of each target by the finalizer of splitmix64 (Steele et al. 2014): int64 [n]."""
    x = (document << 24) + position + 1
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * (factor - (1 << 64))  # as a signed number
    return (x ^ (x >> 31)) & torch.iinfo(torch.int64).max


def count_nearer(sample: TargetSample, candidates: Iterable[Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Count the candidates of all ranks that are strictly nearer to a prediction than its truth is; a collective call.

    Args:
        sample: n targets, the same on all ranks.
        candidates: this rank's, in blocks [m, embed_dim], raw space.
        ranks: all of which call this.

    Returns:
        By predictor, int64 [n]. Memory is bounded by BLOCK predictions against BLOCK candidates.
    """
    sample = sample.to(ranks.device)
    nearer = {name: torch.zeros_like(sample.hashes) for name in sample.predicted}
    parts = [slice(first, first + BLOCK) for first in range(0, len(sample), BLOCK)]
    for block in (part for some in candidates for part in some.to(ranks.device).split(BLOCK)):
        for part in parts:
            for name, predicted in sample.predicted.items():
                nearer[name][part] += (compare(predicted[part], sample.truth[part], block) < 0).sum(1)
    ranks.all_reduce(nearer.values())
    return nearer
