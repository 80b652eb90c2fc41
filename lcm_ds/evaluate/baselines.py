"""What a model has to beat: predictors that need no training beyond linear algebra, and one that only remembers.

All are fitted on the training datasets and applied to the same targets as the model, in normalised space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lcm_ds.config import DataConfig, WeightedPath
from lcm_ds.data.format import Dataset
from lcm_ds.data.loader import Batch
from lcm_ds.evaluate.ranks import Ranks
from lcm_ds.evaluate.targets import Reader, Targets
from lcm_ds.model.normalizer import Normalizer

Predictor = Callable[[Targets], Tensor]

COPY = "copy of the last"

# Ridge penalties that are tried, as shares of the mean variance of the inputs.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
HELD_OUT = 10  # one in so many documents of the training data chooses among them
FIT_ON = 500_000  # concepts of the training data that the linear ones are fitted on, at most
REMEMBERED = 100_000  # concepts of the training data that neighbours are looked for among, at most
NEIGHBOURS_AT_A_TIME = 16_384  # of them that are compared at a time: a matter of memory alone


class Sums:
    """Sums of a least-squares problem: inputs with a 1 appended, outputs; fp64."""

    def __init__(self, inputs: int, outputs: int, device: torch.device | None = None) -> None:
        self.xx = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device)
        self.xy = torch.zeros(inputs + 1, outputs, dtype=torch.float64, device=device)
        self.counts = torch.zeros(2, dtype=torch.float64, device=device)  # outputs squared and summed; samples

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """[n, inputs] and [n, outputs]."""
        x = F.pad(inputs.double(), (0, 1), value=1.0)
        y = outputs.double()
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.counts[0] += y.square().sum()
        self.counts[1] += len(y)

    @property
    def count(self) -> int:
        """Samples."""
        return int(self.counts[1])

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All sums: what ranks add up."""
        return self.xx, self.xy, self.counts

    def plus(self, other: Sums) -> Sums:
        """Both together."""
        total = Sums(0, 0)
        total.xx, total.xy = self.xx + other.xx, self.xy + other.xy
        total.counts = self.counts + other.counts
        return total

    def solve(self, penalty: float) -> Tensor:
        """Weights [inputs + 1, outputs] of the ridge regression; the constant (last row) is not penalised."""
        inputs = len(self.xx) - 1
        ridge = torch.zeros_like(self.xx)
        ridge.diagonal()[:inputs] = penalty * self.xx.diagonal()[:inputs].mean() + 1e-9
        return torch.linalg.solve(self.xx + ridge, self.xy)

    def squared_error(self, weights: Tensor) -> float:
        """Summed squared error of `weights` on this data."""
        fitted = (weights * (self.xx @ weights)).sum() - 2 * (weights * self.xy).sum()
        return float(self.counts[0] + fitted)


def ridge(fit: Sums, held_out: Sums) -> Tensor:
    """Ridge weights by the penalty that is best on held-out training data, then fitted on all of it."""
    best = min(PENALTIES, key=lambda penalty: held_out.squared_error(fit.solve(penalty)))
    return fit.plus(held_out).solve(best)


def apply(weights: Tensor, inputs: Tensor) -> Tensor:
    """[n, inputs] → fp32 [n, outputs]."""
    return (inputs.double() @ weights[:-1] + weights[-1]).float()


class Nearest:
    """Predicts what followed the training concept that is nearest, by cosine in raw space, to the last one.

    Of equals the first. batches: training data, of which all is kept, in the dtype that it is stored in.
    """

    def __init__(self, batches: Iterable[Batch], normalizer: Normalizer) -> None:
        self.normalizer = normalizer
        concepts, followed, seen = [], [], 0
        for batch in batches:
            flat = batch.concepts.flatten(0, 1)
            mask = F.pad(batch.target_mask, (0, 1)).flatten()  # of each concept, whether what follows is a target
            concepts.append(flat.to(normalizer.center.device, copy=True))
            followed.append(mask.nonzero().flatten() + seen)
            seen += len(flat)
        self.concepts = torch.cat(concepts)
        self.followed = torch.cat(followed).to(self.concepts.device)

    def __len__(self) -> int:
        return len(self.followed)

    def __call__(self, targets: Targets) -> Tensor:
        """What followed: [n, embed_dim], normalised space."""
        queries = F.normalize(self.normalizer.denormalize(targets.last), dim=1)
        best = torch.full_like(queries[:, 0], -torch.inf)
        at = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
        for some in self.followed.split(NEIGHBOURS_AT_A_TIME):
            cosines, places = (queries @ F.normalize(self.concepts[some].float(), dim=1).T).max(dim=1)
            nearer = cosines > best
            best, at = torch.where(nearer, cosines, best), torch.where(nearer, some[places], at)
        return self.normalizer.normalize(self.concepts[at + 1])


def shares(data: DataConfig, training: Sequence[WeightedPath], concepts: int) -> list[int]:
    """How many rows of each training dataset make about so many concepts, as many of each as its weight says."""
    total = sum(source.weight for source in training)
    return [max(1, round(concepts * source.weight / total / data.row_length)) for source in training]


def fit_baselines(
    training: Iterable[Targets], normalizer: Normalizer, ranks: Ranks
) -> tuple[dict[str, Predictor], int]:
    """Linear baselines by name, fitted on this rank's and all others' training targets, and how many these were.

    The targets are summed up as they come, none is kept: memory is that of the sums, [embed_dim, embed_dim].

    The mean target; the last concept itself; linear in the last concept; linear in the mean of all concepts before the
    target in its segment.
    """
    dims, device = len(normalizer.center), normalizer.center.device
    last, context = ([Sums(dims, dims, device), Sums(dims, dims, device)] for _ in range(2))
    for targets in training:
        # Whole documents, stirred, so that what chooses is not of those that are fitted, nor of every tenth one.
        chooses = ((targets.document * 0x9E3779B1) >> 16) % HELD_OUT == 0
        for held_out, part in enumerate((~chooses, chooses)):
            last[held_out].add(targets.last[part], targets.truth[part])
            context[held_out].add(targets.context[part], targets.truth[part])
    ranks.add_up(tensor for sums in (*last, *context) for tensor in sums.tensors())
    everything = last[0].plus(last[1])
    mean = (everything.xy[-1] / everything.count).float()
    from_last, from_context = ridge(*last), ridge(*context)
    baselines: dict[str, Predictor] = {
        "mean concept": lambda targets: mean.expand_as(targets.truth),
        COPY: copy_last,
        "ridge from the last": lambda targets: apply(from_last, targets.last),
        "ridge from the context's mean": lambda targets: apply(from_context, targets.context),
    }
    return baselines, everything.count


def copy_last(targets: Targets) -> Tensor:
    """The last concept itself, which needs no training data."""
    return targets.last


def all_baselines(
    reader: Reader, training: Sequence[Dataset], weights: Sequence[WeightedPath], normalizer: Normalizer
) -> tuple[dict[str, Predictor], dict[str, int]]:
    """All baselines by name, and on how many concepts they are fitted and look for neighbours.

    weights: of the training datasets, in their order. Without training data it is the copy alone.
    """
    if not training:
        return {COPY: copy_last}, {"fitted_on": 0, "neighbours_among": 0}
    ranks = reader.ranks
    fitted, remembered = (shares(reader.data, weights, concepts) for concepts in (FIT_ON, REMEMBERED))
    targets = (
        rows.targets
        for dataset, share in zip(training, fitted, strict=True)
        for _, rows in reader.rows(dataset, normalizer, share)
    )
    baselines, count = fit_baselines(targets, normalizer, ranks)
    # All ranks remember the same: it is little to read.
    nearest = Nearest(
        (
            batch
            for dataset, share in zip(training, remembered, strict=True)
            for batch in reader.batches(dataset, share, shared=False)
        ),
        normalizer,
    )
    return {**baselines, "nearest in the training data": nearest}, {
        "fitted_on": count,
        "neighbours_among": len(nearest),
    }
