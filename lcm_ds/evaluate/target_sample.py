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
from lcm_ds.metrics import SAME

BLOCK = 2048  # candidates that are compared at a time; only memory and speed depend on it
PREDICTIONS = 512  # that they are compared with at a time: the distances stay in the processor's cache


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
        By predictor, int64 [n]. Memory is bounded by PREDICTIONS against BLOCK candidates.
    """
    sample = sample.to(ranks.device)
    parts = [slice(first, first + PREDICTIONS) for first in range(0, len(sample), PREDICTIONS)]
    counters = {
        name: [_Counter(predicted[part], sample.truth[part]) for part in parts]
        for name, predicted in sample.predicted.items()
    }
    for block in (part for some in candidates for part in some.to(ranks.device).split(BLOCK)):
        squares = block.double().square().sum(1)
        for counter in (counter for own in counters.values() for counter in own):
            counter.add(block, squares)
    nearer = {
        name: torch.cat([counter.nearer for counter in own]) if own else torch.zeros_like(sample.hashes)
        for name, own in counters.items()
    }
    ranks.all_reduce(nearer.values())
    return nearer


class _Counter:
    """Counts the candidates nearer to predictions than their truths, [n, embed_dim] each, as `metrics.compare` does.

    Distances are computed in fp32, at less than half of the time. Those that its rounding could move to the other side
    of the truth's are computed again in fp64, so that the counts are those of fp64.
    """

    def __init__(self, predicted: Tensor, truth: Tensor) -> None:
        self.nearer = torch.zeros(len(predicted), dtype=torch.int64, device=predicted.device)
        self._predicted, self._exact = predicted, predicted.double()
        lengths, true = self._exact.square().sum(1), truth.double()
        own = (true.square() - 2 * self._exact * true).sum(1)
        # Distances are ‖c‖² − 2 x̂·c, without ‖x̂‖², which is the same for all candidates.
        self._limit = own - SAME * (true.square().sum(1) + lengths)
        self._length = lengths.sqrt()

    def add(self, candidates: Tensor, squares: Tensor) -> None:
        """Count candidates: fp32 [m, embed_dim], and their squared lengths, fp64 [m]."""
        distances = torch.addmm(squares.float(), self._predicted, candidates.T, alpha=-2)
        error = self._rounding(squares.max(), candidates.shape[1])
        # Rounded away from the limit.
        low = (self._limit - error).float().nextafter(squares.new_tensor(-torch.inf, dtype=torch.float32))
        high = (self._limit + error).float().nextafter(squares.new_tensor(torch.inf, dtype=torch.float32))
        surely = distances < low.unsqueeze(1)
        self.nearer += surely.sum(1)
        unsure = (distances < high.unsqueeze(1)).logical_xor_(surely).nonzero()
        for row, column in (some.unbind(1) for some in unsure.split(BLOCK)):
            exact = squares[column] - 2 * (self._exact[row] * candidates[column].double()).sum(1)
            self.nearer.index_add_(0, row, (exact < self._limit[row]).long())

    def _rounding(self, largest: Tensor, dims: int) -> Tensor:
        """The largest error of a distance in fp32, [n], for candidates of squared lengths up to `largest`.

        A dot product in any order of its additions errs by dims · 2⁻²⁴ · ‖x̂‖ · ‖c‖ at most (Higham 2002, Accuracy and
        Stability of Numerical Algorithms, section 3.1); ‖c‖² and the last addition are rounded as well.
        """
        if torch.get_float32_matmul_precision() != "highest":  # products of fewer bits: nothing is sure
            return torch.full_like(self._length, torch.inf)
        return (dims + 4) * 2.0**-24 * (2 * self._length * largest.sqrt() + largest) + 2.0**-23 * self._limit.abs()
