"""What a model has to beat: predictors that need no training beyond linear algebra.

All are fitted on the training dataset, in normalised space, and applied to the same targets as the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lcm_ds.evaluate.metrics import Targets

Predictor = Callable[[Targets], Tensor]

# Ridge penalties that are tried, as shares of the mean variance of the inputs.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
HELD_OUT = 10  # one in so many segments of the training data chooses among them


class Sums:
    """Sums of a least-squares problem: inputs with a 1 appended, outputs; fp64."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.xx = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
        self.xy = torch.zeros(inputs + 1, outputs, dtype=torch.float64)
        self.yy = 0.0
        self.count = 0

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """[n, inputs] and [n, outputs]."""
        x = torch.cat([inputs.double(), torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
        y = outputs.double()
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.square().sum().item()
        self.count += len(y)

    def plus(self, other: Sums) -> Sums:
        """Both together."""
        total = Sums(len(self.xx) - 1, self.xy.shape[1])
        total.xx, total.xy = self.xx + other.xx, self.xy + other.xy
        total.yy, total.count = self.yy + other.yy, self.count + other.count
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
        return self.yy + float(fitted)


def ridge(fit: Sums, held_out: Sums) -> Tensor:
    """Ridge weights by the penalty that is best on held-out training data, then fitted on all of it."""
    best = min(PENALTIES, key=lambda penalty: held_out.squared_error(fit.solve(penalty)))
    return fit.plus(held_out).solve(best)


def apply(weights: Tensor, inputs: Tensor) -> Tensor:
    """[n, inputs] → fp32 [n, outputs]."""
    return (inputs.double() @ weights[:-1] + weights[-1]).float()


def fit_baselines(training: Iterable[Targets], embed_dim: int) -> tuple[dict[str, Predictor], int]:
    """The baselines by name, fitted on blocks of training targets, and how many targets these were.

    The blocks are summed up as they come, none is kept: memory is that of the sums, [embed_dim, embed_dim].

    The mean target; the last concept itself; linear in the last concept; linear in the mean of all concepts before the
    target in its segment.
    """
    last = [Sums(embed_dim, embed_dim), Sums(embed_dim, embed_dim)]
    context = [Sums(embed_dim, embed_dim), Sums(embed_dim, embed_dim)]
    for targets in training:
        # Whole segments, stirred, so that what chooses is not of the documents that are fitted, nor of every tenth one.
        chooses = ((targets.segment * 0x9E3779B1) >> 16) % HELD_OUT == 0
        for held_out, part in enumerate((~chooses, chooses)):
            last[held_out].add(targets.last[part], targets.truth[part])
            context[held_out].add(targets.context[part], targets.truth[part])
    everything = last[0].plus(last[1])
    mean = (everything.xy[-1] / everything.count).float()
    from_last, from_context = ridge(*last), ridge(*context)
    baselines: dict[str, Predictor] = {
        "mean concept": lambda targets: mean.expand_as(targets.truth),
        "copy of the last": lambda targets: targets.last,
        "ridge from the last": lambda targets: apply(from_last, targets.last),
        "ridge from the context's mean": lambda targets: apply(from_context, targets.context),
    }
    return baselines, everything.count
