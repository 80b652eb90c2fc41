"""Predictors that are linear in a target's context: the mean, the copy and ridge regressions.

All are solved from one set of sums over training targets, so memory does not grow with the data. Held-out documents of
the training data, never the validation data, choose penalties and the best predictor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from lcm_ds.baselines.held_out import held_out_of
from lcm_ds.baselines.targets import TargetReader, Targets
from lcm_ds.config import DataConfig, WeightedPath
from lcm_ds.data.format import Dataset
from lcm_ds.matmul import full_precision, pad, products
from lcm_ds.model.normalizer import Normalizer

MEAN, COPY = "mean concept", "copy of the last"
LAST, BEFORE, CONTEXT = range(3)  # the inputs of all sums, [embed_dim] each, followed by a 1
RIDGES = {
    "ridge from the last": (LAST,),
    "ridge from the context's mean": (CONTEXT,),
    "ridge from last and mean": (LAST, CONTEXT),
    "ridge from last two and mean": (LAST, BEFORE, CONTEXT),
}
# Ridge penalties to choose from, relative to the mean variance of the inputs.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
BLOCK = 2048  # targets whose products are summed in fp32; such sums are added in fp64
TILE = 384  # inputs whose products with those that follow are computed at a time


class Sums:
    """Sums of a least-squares problem: inputs with a 1 appended, outputs; fp64.

    Products are summed in fp32 within a block of samples, with an error of about 1e-6 of its largest sums; squares of
    outputs are summed in fp64.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | None = None) -> None:
        self.xx = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device)
        self.xy = torch.zeros(inputs + 1, outputs, dtype=torch.float64, device=device)
        self.counts = torch.zeros(2, dtype=torch.float64, device=device)  # outputs squared and summed; samples

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add samples: [n, inputs] and [n, outputs]."""
        for some_inputs, some_outputs in zip(inputs.split(BLOCK), outputs.split(BLOCK), strict=True):
            x, y, n = _columns(some_inputs), _columns(some_outputs), len(some_inputs)
            self.xx[:-1, :-1] += _squares(x)
            self.xy[:-1] += products(x, y)
            # Of the 1 that is appended to the inputs.
            sums = x.double().sum(1)
            self.xx[:-1, -1] += sums
            self.xx[-1, :-1] += sums
            self.xx[-1, -1] += n
            self.xy[-1] += y.double().sum(1)
            self.counts[0] += y.double().square().sum()
            self.counts[1] += n

    @property
    def count(self) -> int:
        """Number of samples."""
        return int(self.counts[1])

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All sums, for an all-reduce."""
        return self.xx, self.xy, self.counts

    def __add__(self, other: Sums) -> Sums:
        return self._of(self.xx + other.xx, self.xy + other.xy, self.counts + other.counts)

    def select(self, inputs: Tensor) -> Sums:
        """The problem with a subset of the inputs; inputs: int64 [k], their indices."""
        kept = F.pad(inputs, (0, 1), value=len(self.xx) - 1)
        return self._of(self.xx[kept][:, kept], self.xy[kept], self.counts)

    def mean(self) -> Tensor:
        """Weights [inputs + 1, outputs] that always predict the mean of the outputs."""
        weights = torch.zeros_like(self.xy)
        weights[-1] = self.xy[-1] / self.counts[1]
        return weights

    def solve(self, penalty: float) -> Tensor:
        """Weights [inputs + 1, outputs] of the ridge regression; the constant (last row) is not penalised.

        If there are too few samples for a unique solution, the smallest weights that fit.
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
        """A copy on another device."""
        return self._of(*(tensor.to(device) for tensor in self.tensors()))

    @staticmethod
    def _of(xx: Tensor, xy: Tensor, counts: Tensor) -> Sums:
        sums = Sums(0, 0)
        sums.xx, sums.xy, sums.counts = xx, xy, counts
        return sums


def _in_blocks(targets: Iterable[tuple[Targets, Tensor]]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(0, inputs, outputs) of documents to fit to and (1, …) of held-out ones, once there are BLOCK samples of them."""
    waiting: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for batch, chooses in targets:
        inputs = torch.cat([batch.last, batch.before, batch.context], 1)
        for part, mask in enumerate((~chooses, chooses)):
            if mask.any():
                waiting[part].append((inputs[mask], batch.truth[mask]))
            if sum(len(outputs) for _, outputs in waiting[part]) >= BLOCK:
                yield part, *_joined(waiting[part])
                waiting[part] = []
    for part, samples in enumerate(waiting):
        if samples:
            yield part, *_joined(samples)


def _joined(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    inputs, outputs = zip(*samples, strict=True)
    return torch.cat(inputs), torch.cat(outputs)


def _columns(samples: Tensor) -> Tensor:
    """[dims, n] of [n, dims], with zeros after the last sample; fp64 if products of fp32 would not have all bits."""
    columns = pad(samples.T.contiguous(), 1)
    return columns if full_precision() else columns.double()


def _squares(x: Tensor) -> Tensor:
    """x · xᵀ of [dims, n], which is symmetric: what is left of the diagonal's tiles is not computed again."""
    squares = x.new_empty(len(x), len(x))
    for first in range(0, len(x), TILE):
        tile = products(x[first : first + TILE], x[first:])
        squares[first:, first : first + TILE] = tile.T
        squares[first : first + TILE, first:] = tile
    return squares


@dataclass(frozen=True)
class Linear:
    """A fitted predictor."""

    inputs: tuple[int, ...]  # of LAST, BEFORE, CONTEXT
    weights: Tensor  # fp64 [len(inputs) · embed_dim + 1, embed_dim]
    held_out_mse: float  # on the held-out documents, when fitted to the others

    def __call__(self, targets: Targets) -> Tensor:
        """Predictions: fp32 [n, embed_dim], normalised space."""
        if not self.inputs:
            return self.weights[-1].float().expand(targets.truth.shape)
        inputs = (targets.last, targets.before, targets.context)
        chosen = torch.cat([inputs[index] for index in self.inputs], 1)
        return products(chosen, *self._in_fp32) if full_precision() else self._exactly(chosen)

    @cached_property
    def _in_fp32(self) -> tuple[Tensor, Tensor]:
        """Weights [embed_dim, len(inputs) · embed_dim] and constants [embed_dim]."""
        return self.weights[:-1].T.float().contiguous(), self.weights[-1].float()

    def _exactly(self, inputs: Tensor) -> Tensor:
        return torch.addmm(self.weights[-1], inputs.double(), self.weights[:-1]).float()


@dataclass(frozen=True)
class TrainingSums:
    """The sums of training targets, in two parts."""

    fit: Sums
    held_out: Sums  # of held-out documents

    @classmethod
    def from_targets(
        cls,
        targets: Iterable[tuple[Targets, Tensor]],
        embed_dim: int,
        device: torch.device,
        all_reduce: Callable[[Iterable[Tensor]], None],
    ) -> TrainingSums:
        """Sum over the training targets of all ranks.

        Args:
            targets: this rank's, batch by batch, and which are of held-out documents.
            embed_dim: of their concepts.
            device: of the sums, 2 · [3 · embed_dim + 1, 4 · embed_dim + 1] fp64.
            all_reduce: sums tensors over all ranks, in place.
        """
        sums = cls(*(Sums(3 * embed_dim, embed_dim, device) for _ in range(2)))
        for part, inputs, outputs in _in_blocks(targets):
            (sums.fit, sums.held_out)[part].add(inputs, outputs)
        all_reduce([*sums.fit.tensors(), *sums.held_out.tensors()])
        return sums

    @property
    def all(self) -> Sums:
        """Both parts together."""
        return self.fit + self.held_out

    @property
    def chooses(self) -> bool:
        """Whether there are documents to fit to as well as held-out ones to choose by."""
        return self.fit.count > 0 and self.held_out.count > 0

    def predictors(self, names: Sequence[str] = (MEAN, COPY, *RIDGES)) -> dict[str, Linear]:
        """Fit linear predictors to all documents, each with its error on the held-out documents.

        A ridge's penalty is the best one on the held-out documents. If there are too few documents to hold any out, the
        data that is fitted also chooses.
        """
        embed_dim, device = self.fit.xy.shape[1], self.fit.xx.device
        everything = self.all
        fit, choose = (self.fit, self.held_out) if self.chooses else (everything, everything)
        predictors: dict[str, Linear] = {}
        for name in names:
            if name == MEAN:
                predictors[name] = Linear((), everything.mean()[-1:], choose.error(fit.mean()))
                continue
            inputs = RIDGES.get(name, (LAST,))
            columns = torch.cat([index * embed_dim + torch.arange(embed_dim, device=device) for index in inputs])
            part, held_out, full = (sums.select(columns) for sums in (fit, choose, everything))
            if name == COPY:
                weights = torch.eye(embed_dim + 1, embed_dim, dtype=torch.float64, device=device)
                predictors[name] = Linear(inputs, weights, held_out.error(weights))
            else:
                errors = {penalty: held_out.error(part.solve(penalty)) for penalty in PENALTIES}
                penalty = min(errors, key=errors.__getitem__)
                predictors[name] = Linear(inputs, full.solve(penalty), errors[penalty])
        return predictors


def best_of(predictors: Mapping[str, Linear]) -> str:
    """The name of the predictor that is best on the held-out documents; the first of equals."""
    return min(predictors, key=lambda name: predictors[name].held_out_mse)


def rows_per_dataset(data: DataConfig, training: Sequence[WeightedPath], concepts: int) -> list[int]:
    """The rows to read of each training dataset for about `concepts` concepts in all, in proportion to its weight."""
    total = sum(source.weight for source in training)
    return [max(1, round(concepts * source.weight / total / data.row_length)) for source in training]


def training_targets(
    reader: TargetReader,
    training: Sequence[Dataset],
    weights: Sequence[WeightedPath],
    normalizer: Normalizer,
    concepts: int,
) -> Iterable[tuple[Targets, Tensor]]:
    """This rank's share of the training targets, and which are of held-out documents (bool [n]).

    Args:
        reader: of this rank.
        training: the datasets.
        weights: of the datasets, in their order.
        normalizer: the model's.
        concepts: about how many to read over all datasets and ranks.
    """
    for dataset, count in zip(training, rows_per_dataset(reader.data, weights, concepts), strict=True):
        is_held_out = held_out_of(dataset)
        for _, rows in reader.rows(dataset, normalizer, count):
            yield rows.targets, is_held_out(rows.targets.document)
