"""A uniform sample of targets with every predictor's predictions, for retrieval and for the metrics that need text.

The sample is a function of the dataset: each target has a hash of its document and position, and the smallest hashes
are in the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcm_ds.baselines.targets import Targets
from lcm_ds.distributed.collectives import Ranks
from lcm_ds.matmul import full_precision, products
from lcm_ds.metrics import SAME

BLOCK = 1024  # candidates that are compared at a time; only memory and speed depend on it
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
        """The `size` targets with the smallest hashes, which come first: nothing is copied."""
        return self.select(slice(size))

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
    def merge(cls, parts: Sequence[TargetSample], size: int) -> TargetSample:
        """The `size` targets of all parts with the smallest hashes; one field after another, to save memory."""
        order = torch.cat([part.hashes for part in parts]).sort(stable=True).indices[:size]
        return cls(
            torch.cat([part.hashes for part in parts])[order],
            torch.cat([part.document for part in parts])[order],
            torch.cat([part.position for part in parts])[order],
            torch.cat([part.truth for part in parts])[order],
            {name: torch.cat([part.predicted[name] for part in parts])[order] for name in parts[0].predicted},
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
        self._parts.append(TargetSample.merge([sample.select(kept).to(torch.device("cpu"))], self.size))
        self._count += len(self._parts[-1])
        if self._count > 1.25 * self.size:
            self._shrink()

    def gather(self, ranks: Ranks) -> TargetSample:
        """The sample of all ranks, the same on each; a collective call."""
        self._shrink()
        parts = ranks.gather(self._parts.pop())
        return parts[0] if len(parts) == 1 else TargetSample.merge(parts, self.size)

    def _shrink(self) -> None:
        self._parts = [TargetSample.merge(self._parts, self.size)]
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
    counters = {name: _counters(predicted, sample.truth) for name, predicted in sample.predicted.items()}
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


def _counters(predicted: Tensor, truth: Tensor) -> Sequence[_Counter | _ConstantCounter]:
    """What counts for a predictor's predictions and their truths, [n, embed_dim] each: parts of them, in order."""
    if len(predicted) and (predicted == predicted[0]).all():
        return [_ConstantCounter(predicted[0], truth)]
    parts = [slice(first, first + PREDICTIONS) for first in range(0, len(predicted), PREDICTIONS)]
    return [_Counter(predicted[part], truth[part]) for part in parts]


def _limits(predicted: Tensor, truth: Tensor) -> Tensor:
    """Distances below which candidates are nearer, as in `metrics.compare`: fp64 [n] of fp64 [n, embed_dim] each.

    Distances are ‖c‖² − 2 x̂·c, without ‖x̂‖², which is the same for all candidates.
    """
    own = (truth.square() - 2 * predicted * truth).sum(1)
    return own - SAME * (truth.square().sum(1) + predicted.square().sum(1))


class _ConstantCounter:
    """Counts as `_Counter`, for n equal predictions, [embed_dim], such as the mean: all have the same distances."""

    def __init__(self, predicted: Tensor, truth: Tensor) -> None:
        self.nearer = torch.zeros(len(truth), dtype=torch.int64, device=truth.device)
        self._exact = predicted.double()
        self._limit = _limits(self._exact.expand(len(truth), -1), truth.double())

    def add(self, candidates: Tensor, squares: Tensor) -> None:
        """Count candidates: fp32 [m, embed_dim], and their squared lengths, fp64 [m]."""
        distances = torch.addmv(squares, candidates.double(), self._exact, alpha=-2)
        self.nearer += torch.searchsorted(distances.sort().values, self._limit)


class _Counter:
    """Counts the candidates nearer to predictions than their truths, [n, embed_dim] each, as `metrics.compare` does.

    Distances are computed in fp32, at less than half of the time. Those that its rounding could move to the other side
    of the truth's are computed again in fp64, so that the counts are those of fp64.
    """

    def __init__(self, predicted: Tensor, truth: Tensor) -> None:
        self.nearer = torch.zeros(len(predicted), dtype=torch.int64, device=predicted.device)
        self._minus_twice = -2 * predicted
        self._limit = _limits(predicted.double(), truth.double())
        self._length = predicted.double().square().sum(1).sqrt()

    def add(self, candidates: Tensor, squares: Tensor) -> None:
        """Count candidates: fp32 [m, embed_dim], and their squared lengths, fp64 [m]."""
        if not full_precision():  # nothing is sure
            exact = torch.addmm(squares, self._minus_twice.double(), candidates.double().T)
            self.nearer += (exact < self._limit.unsqueeze(1)).sum(1)
            return
        distances = products(self._minus_twice, candidates, squares.float())
        error = self._rounding(squares.max(), candidates.shape[1])
        above = distances.sub_(self._limit.float().unsqueeze(1))
        negative = above.view(torch.int32) >> 31  # the sign's bit: -1, or 0; far quicker than bools
        self.nearer -= negative.sum(1, dtype=torch.int32)
        rows = (~(above.abs().amin(1) > error)).nonzero().flatten()
        unsure = (~(above[rows].abs() > error[rows].unsqueeze(1))).nonzero()
        for row, column in ((rows[some[:, 0]], some[:, 1]) for some in unsure.split(BLOCK)):
            exact = squares[column] + (self._minus_twice[row].double() * candidates[column].double()).sum(1)
            self.nearer.index_add_(0, row, (exact < self._limit[row]).long() + negative[row, column])

    def _rounding(self, largest: Tensor, dims: int) -> Tensor:
        """The largest error of a distance less its limit in fp32, [n], for candidates of squared lengths ≤ `largest`.

        A dot product in any order of its additions errs by dims · 2⁻²⁴ · ‖x̂‖ · ‖c‖ at most (Higham 2002, Accuracy and
        Stability of Numerical Algorithms, section 3.1); ‖c‖², the limit and the last additions are rounded as well.
        """
        sums = (dims + 4) * 2.0**-24 * (2 * self._length * largest.sqrt() + largest)
        return (sums + 2.0**-23 * self._limit.abs()).float() * (1 + 2.0**-20)  # rounded upwards
