"""What a model has to beat: predictors that need no training beyond linear algebra, and one that only remembers.

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
from lcm_ds.baselines.linear import COPY, Training, held_out, shares, training_targets
from lcm_ds.baselines.targets import Reader, Targets
from lcm_ds.config import WeightedPath
from lcm_ds.data.batch import Batch
from lcm_ds.data.format import Dataset
from lcm_ds.distributed.collectives import Ranks
from lcm_ds.evaluate.accumulator import best
from lcm_ds.model.normalizer import Normalizer

Predictor = Callable[[Targets], Tensor]

NEAREST = "nearest in the training data"
FIT_ON = 500_000  # concepts of the training data that the linear ones are fitted on, at most
REMEMBERED = 100_000  # concepts of the training data that neighbours are looked for among, at most
NEIGHBOURS_AT_A_TIME = 16_384  # of them that are compared at a time: a matter of memory alone


class Nearest:
    """Predicts what followed the training concept that is nearest, by cosine in raw space, to the last one.

    Of equals the first. batches: training data, of which all is kept, in the dtype that it is stored in.
    """

    def __init__(self, batches: Iterable[Batch], normalizer: Normalizer) -> None:
        self.normalizer = normalizer
        concepts, followed, chooses, seen = [], [], [], 0
        for batch in batches:
            assert batch.origins is not None
            flat = batch.concepts.flatten(0, 1)
            mask = F.pad(batch.target_mask, (0, 1)).flatten()  # of each concept, whether what follows is a target
            concepts.append(flat.to(normalizer.center.device, copy=True))
            followed.append(mask.nonzero().flatten() + seen)
            chooses.append(held_out(batch.origins[..., 0].flatten()[mask]))
            seen += len(flat)
        self.concepts = torch.cat(concepts)
        device = self.concepts.device
        self.followed, self.chooses = torch.cat(followed).to(device), torch.cat(chooses).to(device)

    def __len__(self) -> int:
        return len(self.followed)

    def __call__(self, targets: Targets) -> Tensor:
        """What followed: [n, embed_dim], normalised space."""
        return self._what_followed(self.normalizer.denormalize(targets.last), self.followed)

    def held_out_mse(self, ranks: Ranks) -> float | None:
        """The error on the held-out documents among those it remembers, looked for among the others.

        Each rank takes its share of the targets; all call this. None if there are no such documents, or no others.
        """
        mine, others = self.followed[self.chooses][ranks.rank :: ranks.size], self.followed[~self.chooses]
        sums = torch.zeros(2, dtype=torch.float64, device=self.concepts.device)
        for some in mine.split(NEIGHBOURS_AT_A_TIME) if len(others) else ():
            predicted = self._what_followed(self.concepts[some].float(), others)
            truth = self.normalizer.normalize(self.concepts[some + 1])
            sums += torch.stack([metrics.squared_error(predicted, truth).double().sum(), sums.new_tensor(len(some))])
        ranks.add_up([sums])
        return float(sums[0] / sums[1]) if sums[1] else None

    def _what_followed(self, last: Tensor, among: Tensor) -> Tensor:
        """[n, embed_dim], normalised space: of last concepts [n, embed_dim], raw space, among places int64 [m]."""
        queries = F.normalize(last, dim=1)
        best = torch.full_like(queries[:, 0], -torch.inf)
        at = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
        for some in among.split(NEIGHBOURS_AT_A_TIME):
            cosines, places = (queries @ F.normalize(self.concepts[some].float(), dim=1).T).max(dim=1)
            nearer = cosines > best
            best, at = torch.where(nearer, cosines, best), torch.where(nearer, some[places], at)
        return self.normalizer.normalize(self.concepts[at + 1])


@dataclass(frozen=True)
class Baselines:
    """All baselines, and which is the best."""

    predictors: dict[str, Predictor]
    fitted_on: int = 0  # targets of the training data
    held_out: int = 0  # of them, those of documents that chose
    neighbours_among: int = 0
    held_out_mse: dict[str, float | None] = field(default_factory=dict)

    @property
    def best(self) -> str:
        """The one that is best on held-out documents of the training data; the copy, if no training data is known."""
        return best(self.held_out_mse) or COPY

    def told(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "fitted_on": self.fitted_on,
            "held_out": self.held_out,
            "neighbours_among": self.neighbours_among,
            "held_out_mse": self.held_out_mse,
            "best": self.best,
        }


def copy_last(targets: Targets) -> Tensor:
    """The last concept itself, which needs no training data."""
    return targets.last


def fit_baselines(
    reader: Reader, training: Sequence[Dataset], weights: Sequence[WeightedPath], normalizer: Normalizer, ranks: Ranks
) -> Baselines:
    """All baselines, fitted to the training datasets; the copy alone where there are none.

    Args:
        reader: of this rank's share.
        training: the datasets.
        weights: of the training datasets, in their order.
        normalizer: the model's.
        ranks: all of which call this.
    """
    if not training:
        return Baselines({COPY: copy_last})
    targets = training_targets(reader, training, weights, normalizer, FIT_ON)
    sums = Training.of(targets, len(normalizer.center), normalizer.center.device, ranks.add_up)
    linear = sums.predictors()
    # All ranks remember the same: it is little to read.
    nearest = Nearest(
        (
            batch
            for dataset, share in zip(training, shares(reader.data, weights, REMEMBERED), strict=True)
            for batch in reader.batches(dataset, share, shared=False)
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
