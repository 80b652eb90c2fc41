"""Targets that are held in memory, drawn uniformly, with what each predictor says of them: for retrieval and for text.

Which ones is a function of the dataset alone: a target has a number that comes from its document and position, and
those with the smallest numbers are held.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lcm_ds.baselines.targets import Targets
from lcm_ds.distributed.collectives import Ranks
from lcm_ds.metrics import compare

CANDIDATES = 2048  # that are compared with as many predictions at a time: a matter of memory alone


@dataclass(frozen=True)
class TargetSample:
    """Targets in order of their numbers, [n] of each; raw space, fp32, on the CPU."""

    number: Tensor  # int64
    document: Tensor
    position: Tensor
    truth: Tensor  # [n, embed_dim]
    predicted: dict[str, Tensor]  # by predictor, [n, embed_dim]

    def __len__(self) -> int:
        return len(self.number)

    def smallest(self, size: int) -> TargetSample:
        """The `size` first ones."""
        return self.some(self.number.sort(stable=True).indices[:size])

    def some(self, which: Tensor | slice) -> TargetSample:
        """Those at some places."""
        return TargetSample(
            self.number[which],
            self.document[which],
            self.position[which],
            self.truth[which],
            {name: values[which] for name, values in self.predicted.items()},
        )

    def to(self, device: torch.device) -> TargetSample:
        """The same on another device."""
        predicted = {name: values.to(device) for name, values in self.predicted.items()}
        return TargetSample(
            self.number.to(device), self.document.to(device), self.position.to(device), self.truth.to(device), predicted
        )

    @classmethod
    def joined(cls, parts: list[TargetSample]) -> TargetSample:
        """All of them together."""
        return cls(
            torch.cat([part.number for part in parts]),
            torch.cat([part.document for part in parts]),
            torch.cat([part.position for part in parts]),
            torch.cat([part.truth for part in parts]),
            {name: torch.cat([part.predicted[name] for part in parts]) for name in parts[0].predicted},
        )


class BottomKSampler:
    """Takes targets as they come and keeps the `size` with the smallest numbers; at most a quarter more in between."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._parts: list[TargetSample] = []
        self._count = 0
        self._below = torch.iinfo(torch.int64).max  # larger numbers are out of the running

    def add(self, targets: Targets, truth: Tensor, predicted: Mapping[str, Tensor]) -> None:
        """Consider targets; truth and each prediction [n, embed_dim], raw space."""
        numbers = splitmix64(targets.document, targets.position)
        found = TargetSample(numbers, targets.document, targets.position, truth, dict(predicted))
        found = found.some((numbers <= self._below).nonzero().flatten()).to(torch.device("cpu")).smallest(self.size)
        self._parts.append(found)
        self._count += len(found)
        if self._count > 1.25 * self.size:
            self._shrink()

    def gathered(self, ranks: Ranks) -> TargetSample:
        """Those with the smallest numbers of all ranks, the same on each."""
        self._shrink()
        return TargetSample.joined(ranks.gather(self._parts[0])).smallest(self.size)

    def _shrink(self) -> None:
        self._parts = [TargetSample.joined(self._parts).smallest(self.size)]
        self._count = len(self._parts[0])
        if self._count == self.size:
            self._below = int(self._parts[0].number[-1])


def splitmix64(document: Tensor, position: Tensor) -> Tensor:
    """A number from 0 for each target, which looks drawn at random (the finalizer of splitmix64): int64 [n]."""
    x = (document << 24) + position + 1
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * (factor - (1 << 64))  # as a signed number
    return (x ^ (x >> 31)) & torch.iinfo(torch.int64).max


def count_nearer(held: TargetSample, candidates: Iterable[Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """How many candidates of all ranks are strictly nearer to each held prediction than its truth is, by predictor.

    candidates: this rank's, block by block, [m, embed_dim], raw space. Returns int64 [n]. What is in memory at a time
    is a block of at most CANDIDATES candidates against as many predictions, whatever there is of both.
    """
    held = held.to(ranks.device)
    nearer = {name: torch.zeros_like(held.number) for name in held.predicted}
    parts = [slice(first, first + CANDIDATES) for first in range(0, len(held), CANDIDATES)]
    for some in (part for block in candidates for part in block.to(ranks.device).split(CANDIDATES)):
        for part in parts:
            for name, predicted in held.predicted.items():
                nearer[name][part] += (compare(predicted[part], held.truth[part], some) < 0).sum(1)
    ranks.add_up(nearer.values())
    return nearer
