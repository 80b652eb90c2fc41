"""How good predicted concepts are, in raw and in normalised space; added up block by block."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

SPACES = ("normalised", "raw")
# Targets that are told apart from one another for contrastive accuracy: consecutive ones, in order.
BLOCK = 256


@dataclass(frozen=True)
class Targets:
    """Consecutive targets of an evaluation, fp32, normalised space."""

    truth: Tensor  # [n, embed_dim]
    last: Tensor  # [n, embed_dim]: the concept before each
    context: Tensor  # [n, embed_dim]: the mean of all concepts before it in its segment
    segment: Tensor  # int64 [n]: targets of the same segment have the same number
    position: Tensor  # int64 [n]: in the segment

    def __len__(self) -> int:
        return len(self.truth)

    def __getitem__(self, part: slice) -> Targets:
        return Targets(self.truth[part], self.last[part], self.context[part], self.segment[part], self.position[part])


def contrastive_accuracy(predicted: Tensor, targets: Targets, truth: Tensor) -> Tensor:
    """Share of the other concepts of a block that are further from each prediction than its truth is: [n], 0 to 1.

    predicted, truth: [n, embed_dim], in one space; `truth` is targets.truth in that space. The truth's two neighbours
    in its document are left out (LCM paper, arXiv 2412.08821: contrastive accuracy, CA). A concept as near as the truth
    is not further. NaN for a target that has no others in its block.
    """
    # Not by matrix products, which would round away the difference between near concepts.
    distance = torch.cdist(predicted, truth, compute_mode="donot_use_mm_for_euclid_dist")
    further = distance > distance.diagonal().unsqueeze(1)
    same = targets.segment.unsqueeze(1) == targets.segment.unsqueeze(0)
    apart = (targets.position.unsqueeze(1) - targets.position.unsqueeze(0)).abs()
    counted = ~(same & (apart <= 1))  # neither itself nor a neighbour
    return (further & counted).sum(1) / counted.sum(1)


@dataclass
class Score:
    """Sums of one predictor's figures in one space."""

    count: int = 0
    squared: float = 0.0  # of the error, mean over dimensions
    l2: float = 0.0
    cosine: float = 0.0
    contrastive: float = 0.0
    compared: int = 0  # targets that had others to be told apart from
    moments: dict[str, Tensor] = field(default_factory=dict)  # fp64 [embed_dim]: sums and sums of squares

    def add(self, predicted: Tensor, truth: Tensor, targets: Targets) -> None:
        """One block: predicted and truth fp32 [n, embed_dim], in this score's space."""
        error = predicted - truth
        self.count += len(truth)
        self.squared += error.square().mean(1).sum().item()
        self.l2 += error.norm(dim=1).sum().item()
        self.cosine += F.cosine_similarity(predicted, truth, dim=1).sum().item()
        shares = contrastive_accuracy(predicted, targets, truth)
        self.contrastive += shares.nansum().item()
        self.compared += int((~shares.isnan()).sum())
        for name, values in (("predicted", predicted.double()), ("truth", truth.double())):
            for power, total in (("sum", values.sum(0)), ("squares", values.square().sum(0))):
                key = f"{name}_{power}"
                self.moments[key] = self.moments.get(key, 0) + total

    def read(self) -> dict[str, float | None]:
        """mse (mean over dimensions), l2, cosine, ca, each a mean over targets, of which there has to be one at least.

        variance_ratio: variance of the predictions over that of the targets, both summed over dimensions. A regression
        that tends to the mean of what could follow has a low one. None stands for what so few targets do not tell: ca
        where none had others beside it, variance_ratio where all are the same.
        """
        of_truth = self._variance("truth")
        return {
            "mse": self.squared / self.count,
            "l2": self.l2 / self.count,
            "cosine": self.cosine / self.count,
            "ca": self.contrastive / self.compared if self.compared else None,
            "variance_ratio": self._variance("predicted") / of_truth if of_truth else None,
        }

    def _variance(self, name: str) -> float:
        mean = self.moments[f"{name}_sum"] / self.count
        # That of a constant may come out a rounding below 0.
        return max(0.0, float((self.moments[f"{name}_squares"] / self.count - mean.square()).sum()))
