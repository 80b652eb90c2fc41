"""The baselines of an evaluation: linear predictors, and the nearest neighbour in the training data.

All are fitted on the training datasets and applied to the same targets as the model, in normalised space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcm_ds import metrics
from lcm_ds.baselines.held_out import Choice, held_out_of
from lcm_ds.baselines.linear import COPY, TrainingSums, rows_per_dataset, training_targets
from lcm_ds.baselines.targets import TargetReader, Targets
from lcm_ds.config import WeightedPath
from lcm_ds.data.batch import Batch
from lcm_ds.data.format import Dataset
from lcm_ds.distributed.collectives import Ranks
from lcm_ds.evaluate.accumulator import best
from lcm_ds.matmul import cpu_has_bf16, products
from lcm_ds.model.normalizer import Normalizer

Predictor = Callable[[Targets], Tensor]

NEAREST = "nearest in the training data"
LINEAR_CONCEPTS = 500_000  # concepts of the training data, at most, that linear predictors are fitted on by default
NEIGHBOUR_CONCEPTS = 100_000  # concepts of the training data, at most, to search for neighbours
BLOCK = 1024  # concepts that are searched at a time, and
QUERIES = 512  # targets that are looked for at a time: the cosines stay in the processor's cache
# More than the error of a cosine of unit vectors in bf16: each vector is rounded by up to 2⁻⁸ of it, the sum by 2⁻⁹.
BF16_ERROR = 2.0**-6
EQUAL = 2.0**-20  # Cosines of different blocks in fp32 that differ by less are equal


class NearestNeighbour:
    """Predicts the concept that followed the training concept nearest to the last one, by cosine in raw space.

    Args:
        batches: training data, and what tells which of its documents are held out.
        normalizer: the model's.

    In memory are the concepts, in the dtype that they are stored in, and unit vectors of those that are searched, in
    fp32 and, on a CPU that has it, in bf16.
    """

    def __init__(self, batches: Iterable[tuple[Batch, Choice]], normalizer: Normalizer) -> None:
        self.normalizer = normalizer
        concepts, followed, chooses, seen = [], [], [], 0
        for batch, is_held_out in batches:
            assert batch.origins is not None
            flat = batch.concepts.flatten(0, 1)
            mask = F.pad(batch.target_mask, (0, 1)).flatten()  # whether the next concept is a target
            concepts.append(flat.to(normalizer.center.device, copy=True))
            followed.append(mask.nonzero().flatten() + seen)
            chooses.append(is_held_out(batch.origins[..., 0].flatten()[mask]))
            seen += len(flat)
        self.concepts = torch.cat(concepts)
        device = self.concepts.device
        # Indices of concepts that a target follows, and which of these are of held-out documents.
        self.followed, self.chooses = torch.cat(followed).to(device), torch.cat(chooses).to(device)
        self._directions = torch.empty(len(self.followed), self.concepts.shape[1], device=device)
        for index, directions in zip(self.followed.split(BLOCK), self._directions.split(BLOCK), strict=True):
            F.normalize(self.concepts[index].float(), dim=1, out=directions)
        # With AVX512-BF16 a product in bf16 takes half of the time, with AMX a sixth.
        self._rough = self._directions.bfloat16() if device.type == "cpu" and cpu_has_bf16() else self._directions

    def __len__(self) -> int:
        return len(self.followed)

    def __call__(self, targets: Targets) -> Tensor:
        """Predictions: [n, embed_dim], normalised space."""
        return self._followers(self.normalizer.denormalize(targets.last))

    def held_out_mse(self, ranks: Ranks) -> float | None:
        """The error on the held-out documents, searching the others; a collective call.

        None if there are no such documents, or no others.
        """
        share = self.followed[self.chooses][ranks.rank :: ranks.size]
        sums = torch.zeros(2, dtype=torch.float64, device=self.concepts.device)
        for some in share.split(QUERIES) if not self.chooses.all() else ():
            predicted = self._followers(self.concepts[some].float(), self.chooses)
            truth = self.normalizer.normalize(self.concepts[some + 1])
            sums += torch.stack([metrics.squared_error(predicted, truth).double().sum(), sums.new_tensor(len(some))])
        ranks.all_reduce([sums])
        return float(sums[0] / sums[1]) if sums[1] else None

    def _followers(self, last: Tensor, without: Tensor | None = None) -> Tensor:
        """What followed the nearest concepts: [n, embed_dim], normalised space.

        last: [n, embed_dim], raw space. without: bool, which of `followed` are not searched.
        """
        bias = self._directions.new_zeros(len(self.followed))
        if without is not None:
            bias[without] = -torch.inf
        nearest = torch.cat([self._nearest(queries, bias) for queries in F.normalize(last, dim=1).split(QUERIES)])
        return self.normalizer.normalize(self.concepts[self.followed[nearest] + 1])

    def _nearest(self, queries: Tensor, bias: Tensor) -> Tensor:
        """The indices in `followed` of the concepts with the largest cosines, the first of equals: int64 [n].

        queries: [n, embed_dim], of length 1. bias: [len(followed)], is added to the cosines.
        """
        rough = queries.to(self._rough.dtype)
        highest = torch.full_like(queries[:, 0], -torch.inf)
        nearest = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
        for first in range(0, len(self.followed), BLOCK):
            block = slice(first, first + BLOCK)
            cosines = products(rough, self._rough[block], bias[block].to(rough.dtype))
            # Few queries have a nearer concept here than in all blocks before: only those are looked at, and in fp32.
            if rough is queries:
                rows = (cosines.amax(1) > highest).nonzero().flatten()
                cosines = cosines[rows]
            else:
                rows = (cosines.amax(1).float() + BF16_ERROR > highest).nonzero().flatten()
                cosines = queries[rows] @ self._directions[block].T + bias[block]
            largest, index = cosines.max(1)
            nearer = largest > highest[rows] + EQUAL
            highest[rows[nearer]], nearest[rows[nearer]] = largest[nearer], index[nearer] + first
        return nearest


@dataclass(frozen=True)
class Baselines:
    """All baselines, and which is the best."""

    predictors: dict[str, Predictor]
    fitted_on: int = 0  # targets of the training data
    held_out: int = 0  # how many of them are of held-out documents
    neighbours_among: int = 0
    held_out_mse: dict[str, float | None] = field(default_factory=dict)

    @property
    def best(self) -> str:
        """The best one on held-out training documents; the copy if the training data is unknown."""
        return best(self.held_out_mse) or COPY

    def to_json(self) -> dict[str, Any]:
        """The block `baselines` of evaluation.json."""
        return {
            "fitted_on": self.fitted_on,
            "held_out": self.held_out,
            "neighbours_among": self.neighbours_among,
            "held_out_mse": self.held_out_mse,
            "best": self.best,
        }


def fit_baselines(
    reader: TargetReader,
    training: Sequence[Dataset],
    weights: Sequence[WeightedPath],
    normalizer: Normalizer,
    ranks: Ranks,
    linear_concepts: int = LINEAR_CONCEPTS,
) -> Baselines:
    """Fit all baselines to the training datasets; without any, only the copy is left. A collective call.

    Args:
        reader: of this rank's share.
        training: the datasets.
        weights: of the training datasets, in their order.
        normalizer: the model's.
        ranks: all of which call this.
        linear_concepts: of the training data, at most, that linear predictors are fitted to.
    """
    if not training:
        return Baselines({COPY: lambda targets: targets.last})
    targets = training_targets(reader, training, weights, normalizer, linear_concepts)
    sums = TrainingSums.from_targets(targets, len(normalizer.center), normalizer.center.device, ranks.all_reduce)
    linear = sums.predictors()
    # Every rank keeps all neighbours: they are quick to read.
    nearest = NearestNeighbour(
        (
            (batch, is_held_out)
            for dataset, rows in zip(training, rows_per_dataset(reader.data, weights, NEIGHBOUR_CONCEPTS), strict=True)
            for is_held_out in (held_out_of(dataset),)
            for batch in reader.batches(dataset, rows, shared=False)
        ),
        normalizer,
    )
    return Baselines(
        {**linear, NEAREST: nearest},
        sums.all.count,
        sums.held_out.count if sums.chooses else 0,
        len(nearest),
        {
            **{name: predictor.held_out_mse for name, predictor in linear.items()},
            NEAREST: nearest.held_out_mse(ranks),
        },
    )
