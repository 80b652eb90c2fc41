"""Predictors that are linear in what stands before a target: the mean, the copy and ridge regressions.

All come from one set of sums, which training targets are added to as they come: memory does not grow with the data.
Which of them is the best is decided by documents of the training data that are held out, never by validation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lcm_ds.baselines.targets import Reader, Targets
from lcm_ds.config import DataConfig, WeightedPath
from lcm_ds.data.format import Dataset
from lcm_ds.model.normalizer import Normalizer

MEAN, COPY = "mean concept", "copy of the last"
LAST, BEFORE, CONTEXT = range(3)  # the inputs of all sums, [embed_dim] each, and then a 1
RIDGES = {
    "ridge from the last": (LAST,),
    "ridge from the context's mean": (CONTEXT,),
    "ridge from last and mean": (LAST, CONTEXT),
    "ridge from last two and mean": (LAST, BEFORE, CONTEXT),
}
# Ridge penalties that are tried, as shares of the mean variance of the inputs.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
HELD_OUT = 10  # one in so many documents of the training data chooses: a penalty, and the best predictor
AT_A_TIME = 4096  # targets that are added at a time: a matter of memory alone


class Sums:
    """Sums of a least-squares problem: inputs with a 1 appended, outputs; fp64."""

    def __init__(self, inputs: int, outputs: int, device: torch.device | None = None) -> None:
        self.xx = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device)
        self.xy = torch.zeros(inputs + 1, outputs, dtype=torch.float64, device=device)
        self.counts = torch.zeros(2, dtype=torch.float64, device=device)  # outputs squared and summed; samples

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """[n, inputs] and [n, outputs]."""
        for some, others in zip(inputs.split(AT_A_TIME), outputs.split(AT_A_TIME), strict=True):
            x, y = F.pad(some.double(), (0, 1), value=1.0), others.double()
            self.xx.addmm_(x.T, x)
            self.xy.addmm_(x.T, y)
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
        return self._of(self.xx + other.xx, self.xy + other.xy, self.counts + other.counts)

    def part(self, inputs: Tensor) -> Sums:
        """The problem that has only some of the inputs, int64 [k]: its sums are among these."""
        kept = F.pad(inputs, (0, 1), value=len(self.xx) - 1)
        return self._of(self.xx[kept][:, kept], self.xy[kept], self.counts)

    def mean(self) -> Tensor:
        """Weights [inputs + 1, outputs] that predict the mean of the outputs, whatever the inputs."""
        weights = torch.zeros_like(self.xy)
        weights[-1] = self.xy[-1] / self.counts[1]
        return weights

    def solve(self, penalty: float) -> Tensor:
        """Weights [inputs + 1, outputs] of the ridge regression; the constant (last row) is not penalised.

        Of a handful of samples, or of none, the smallest weights that fit.
        """
        inputs = len(self.xx) - 1
        ridge = torch.zeros_like(self.xx)
        ridge.diagonal()[:inputs] = penalty * self.xx.diagonal()[:inputs].mean() + 1e-9
        weights, singular = torch.linalg.solve_ex(self.xx + ridge, self.xy)
        return torch.linalg.pinv(self.xx + ridge, hermitian=True) @ self.xy if singular else weights

    def squared_error(self, weights: Tensor) -> float:
        """Summed squared error of `weights` on this data."""
        fitted = (weights * (self.xx @ weights)).sum() - 2 * (weights * self.xy).sum()
        return float(self.counts[0] + fitted)

    def error(self, weights: Tensor) -> float:
        """Mean squared error of `weights` on this data, over samples and outputs; NaN without samples."""
        return self.squared_error(weights) / (self.count * self.xy.shape[1]) if self.count else math.nan

    def to(self, device: torch.device) -> Sums:
        """The same on another device."""
        return self._of(*(tensor.to(device) for tensor in self.tensors()))

    @staticmethod
    def _of(xx: Tensor, xy: Tensor, counts: Tensor) -> Sums:
        found = Sums(0, 0)
        found.xx, found.xy, found.counts = xx, xy, counts
        return found


@dataclass(frozen=True)
class Linear:
    """A fitted predictor."""

    inputs: tuple[int, ...]  # of LAST, BEFORE, CONTEXT
    weights: Tensor  # fp64 [len(inputs) · embed_dim + 1, embed_dim]
    held_out_mse: float  # on the held-out documents, of what is fitted to the others

    def __call__(self, targets: Targets) -> Tensor:
        """What it predicts: fp32 [n, embed_dim], normalised space."""
        every = targets.last, targets.before, targets.context
        embed_dim = targets.truth.shape[1]
        predicted = self.weights[-1].expand(targets.truth.shape).clone()
        for first, number in enumerate(self.inputs):
            predicted.addmm_(every[number].double(), self.weights[first * embed_dim : (first + 1) * embed_dim])
        return predicted.float()


@dataclass(frozen=True)
class Training:
    """The sums of training targets, in two parts."""

    fit: Sums
    held_out: Sums  # of documents that choose

    @classmethod
    def of(
        cls,
        targets: Iterable[Targets],
        embed_dim: int,
        device: torch.device,
        add_up: Callable[[Iterable[Tensor]], None],
    ) -> Training:
        """Add up training targets.

        Args:
            targets: this rank's, batch by batch; none is kept.
            embed_dim: of their concepts.
            device: where the sums are, 2 · [3 · embed_dim + 1, 4 · embed_dim + 1] fp64.
            add_up: makes tensors, in place, the sums of those of all ranks.
        """
        found = cls(*(Sums(3 * embed_dim, embed_dim, device) for _ in range(2)))
        for some in targets:
            chooses = held_out(some.document)
            inputs = torch.cat([some.last, some.before, some.context], 1)
            for sums, part in ((found.fit, ~chooses), (found.held_out, chooses)):
                sums.add(inputs[part], some.truth[part])
        add_up([*found.fit.tensors(), *found.held_out.tensors()])
        return found

    @property
    def all(self) -> Sums:
        """Both parts together."""
        return self.fit.plus(self.held_out)

    @property
    def chooses(self) -> bool:
        """Whether there are both, documents to fit to and documents to choose by."""
        return self.fit.count > 0 and self.held_out.count > 0

    def predictors(self, names: Sequence[str] = (MEAN, COPY, *RIDGES)) -> dict[str, Linear]:
        """Linear predictors by name, fitted to everything, each with its error on the held-out documents.

        A ridge's penalty is the best on the held-out documents. With too few documents to hold any out, the data that
        is fitted also chooses.
        """
        embed_dim = self.fit.xy.shape[1]
        everything = self.all
        fit, chooses = (self.fit, self.held_out) if self.chooses else (everything, everything)
        found: dict[str, Linear] = {}
        for name in names:
            if name == MEAN:
                found[name] = Linear((), everything.mean()[-1:], chooses.error(fit.mean()))
                continue
            numbers = RIDGES.get(name, (LAST,))
            columns = [number * embed_dim + torch.arange(embed_dim, device=everything.xx.device) for number in numbers]
            some, others, whole = (sums.part(torch.cat(columns)) for sums in (fit, chooses, everything))
            if name == COPY:
                weights = torch.eye(embed_dim + 1, embed_dim, dtype=torch.float64, device=everything.xx.device)
                found[name] = Linear(numbers, weights, others.error(weights))
            else:
                errors = {penalty: others.error(some.solve(penalty)) for penalty in PENALTIES}
                best = min(errors, key=errors.__getitem__)
                found[name] = Linear(numbers, whole.solve(best), errors[best])
        return found


def held_out(document: Tensor) -> Tensor:
    """Which documents, int64 [n] counted through their dataset, choose and are not fitted: bool [n].

    Whole documents, stirred, so that what chooses is not every tenth one.
    """
    return ((document * 0x9E3779B1) >> 16) % HELD_OUT == 0


def best_of(predictors: Mapping[str, Linear]) -> str:
    """The name of the one that is best on the held-out documents; of equals the first."""
    return min(predictors, key=lambda name: predictors[name].held_out_mse)


def shares(data: DataConfig, training: Sequence[WeightedPath], concepts: int) -> list[int]:
    """How many rows of each training dataset make about so many concepts, as many of each as its weight says."""
    total = sum(source.weight for source in training)
    return [max(1, round(concepts * source.weight / total / data.row_length)) for source in training]


def training_targets(
    reader: Reader, training: Sequence[Dataset], weights: Sequence[WeightedPath], normalizer: Normalizer, concepts: int
) -> Iterable[Targets]:
    """This rank's share of about `concepts` concepts of the training datasets, whose weights are in their order."""
    for dataset, share in zip(training, shares(reader.data, weights, concepts), strict=True):
        for _, rows in reader.rows(dataset, normalizer, share):
            yield rows.targets
