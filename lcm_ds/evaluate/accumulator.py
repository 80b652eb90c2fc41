"""Sums of figures over groups of whole documents, and from them each figure with a bootstrap confidence interval.

Documents, not targets, are drawn again (Efron & Tibshirani 1993, chapter 8): targets of one document are alike. There
are GROUPS groups at most, so that memory does not grow with the dataset.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lcm_ds.distributed.collectives import Ranks
from lcm_ds.metrics import CONSTANT, covariance, rank_of, variance

GROUPS = 256
REPLICATES = 1000
SPECTRA = 8  # groups of the covariances, each [embed_dim, embed_dim]
SEED = 0
LEVEL = 0.95
NORMAL = 1.959964  # its quantile of (1 + LEVEL) / 2
# The first and the last position of each bucket; the last has no end.
BUCKETS = ((1, 1), (2, 2), *((2**i + 1, 2 ** (i + 1)) for i in range(1, 9)), (513, None))

Figures = dict[str, Tensor]  # name → one for each row of the weights; NaN where there are no targets for it
Interval = list[float]  # [low, high]


def bucket_of(positions: Tensor) -> Tensor:
    """The number in BUCKETS of positions from 1: int64 [n]."""
    ends = torch.tensor([last for _, last in BUCKETS if last is not None], device=positions.device)
    return torch.bucketize(positions.contiguous(), ends)


class Accumulator:
    """What is known of one predictor, or of the truth.

    Means are of whatever is added under a name; NaN are not counted. Vectors give variances, and one kind of them
    effective ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._means: dict[str, Tensor] = {}  # fp64 [GROUPS, k, 2]: sums and counts
        self._vectors: dict[str, Tensor] = {}  # fp64 [GROUPS, 2 + embed_dim]: counts, squared lengths, sums
        self._spectrum: tuple[Tensor, Tensor, Tensor] | None = None  # counts, sums, sums of outer products

    def add(self, name: str, values: Tensor, documents: Tensor, buckets: Tensor | None = None) -> None:
        """Values [n] of targets of `documents`, int64 [n]; the mean of each bucket where there are such, int64 [n]."""
        width = 1 if buckets is None else len(BUCKETS)
        if name not in self._means:
            self._means[name] = torch.zeros(GROUPS, width, 2, dtype=torch.float64, device=self.device)
        known = ~values.isnan()
        places = documents % GROUPS * width + (0 if buckets is None else buckets)
        sums = torch.stack([values.nan_to_num().double(), known.double()], dim=1)
        self._means[name].view(-1, 2).index_add_(0, places, sums)

    def add_vectors(self, name: str, vectors: Tensor, documents: Tensor) -> None:
        """Vectors [n, embed_dim]: of their variance."""
        if name not in self._vectors:
            shape = GROUPS, 2 + vectors.shape[1]
            self._vectors[name] = torch.zeros(shape, dtype=torch.float64, device=self.device)
        exact = vectors.double()
        sums = torch.cat([torch.ones_like(exact[:, :1]), exact.square().sum(1, keepdim=True), exact], dim=1)
        self._vectors[name].index_add_(0, documents % GROUPS, sums)

    def add_spectrum(self, vectors: Tensor, documents: Tensor) -> None:
        """Vectors [n, embed_dim]: of their effective rank."""
        dims = vectors.shape[1]
        if self._spectrum is None:
            counts, sums, products = (
                torch.zeros(SPECTRA, *shape, dtype=torch.float64, device=self.device)
                for shape in ((), (dims,), (dims, dims))
            )
            self._spectrum = counts, sums, products
        counts, sums, products = self._spectrum
        for group in range(SPECTRA):
            some = vectors[documents % SPECTRA == group].double()
            counts[group] += len(some)
            sums[group] += some.sum(0)
            products[group].addmm_(some.T, some)

    def add_up(self, ranks: Ranks) -> None:
        """Take in what all other ranks have; all call this, with the same names."""
        ranks.add_up([*self._means.values(), *self._vectors.values(), *(self._spectrum or ())])

    @property
    def groups(self) -> Tensor:
        """Which groups have targets: bool [GROUPS]."""
        found = torch.zeros(GROUPS, dtype=torch.bool, device=self.device)
        for sums in self._means.values():
            found |= sums[..., 1].sum(1) > 0
        return found

    def means(self, weights: Tensor) -> Figures:
        """Means by name; weights: fp64 [replicates, GROUPS], how often each group counts. Buckets make it [.., k]."""
        found = {}
        for name, sums in self._means.items():
            total = torch.einsum("rg,gks->rks", weights, sums)
            mean = total[..., 0] / total[..., 1]
            found[name] = mean.squeeze(1) if mean.shape[1] == 1 else mean
        return found

    def variances(self, weights: Tensor) -> Figures:
        """Variances, summed over dimensions, by name."""
        sums = {name: weights @ sums for name, sums in self._vectors.items()}
        return {name: variance(each[:, 0], each[:, 2:], each[:, 1]) for name, each in sums.items()}

    def counts(self, name: str) -> Tensor:
        """How many targets are in a mean, in each of its buckets: [k]."""
        return self._means[name][..., 1].sum(0)

    def effective_rank(self) -> tuple[float | None, Interval | None]:
        """The effective rank of the vectors, and its interval.

        A replicate's spectrum is taken along the axes of the whole's, which is right to first order: a decomposition of
        each would take minutes. Replicates, in which some vectors come twice, have lower ranks by nature: they tell the
        spread alone, and the interval is that of a normal distribution.
        """
        if self._spectrum is None or not self._spectrum[0].sum() > 0:
            return None, None
        counts, sums, products = self._spectrum
        matrix = covariance(counts.sum(), sums.sum(0), products.sum(0))
        if not matrix.trace() > CONSTANT:
            return None, None
        spectrum, axes = torch.linalg.eigh(matrix)
        whole, weights = float(rank_of(spectrum)), draw(counts > 0)
        if weights is None:
            return whole, None
        count = (weights @ counts).unsqueeze(1)
        along = ((products @ axes) * axes).sum(1)  # [SPECTRA, embed_dim]: sums of squares along each axis
        again = rank_of(weights @ along / count - (weights @ (sums @ axes) / count).square())
        groups = int((counts > 0).sum())
        spread = NORMAL * float(again.std()) * (groups / (groups - 1)) ** 0.5  # for a few groups tell too little of it
        return whole, [max(1.0, whole - spread), whole + spread]


def draw(groups: Tensor, replicates: int = REPLICATES) -> Tensor | None:
    """Weights of a bootstrap: fp64 [replicates, len(groups)], how often each group is drawn; None for fewer than two.

    groups: bool, those there are. As many are drawn as there are, with replacement; always the same for as many.
    """
    there = groups.nonzero().flatten()
    if len(there) < 2:
        return None
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(len(there), (replicates, len(there)), generator=generator).to(there.device)
    weights = torch.zeros(replicates, len(groups), dtype=torch.float64, device=groups.device)
    return weights.scatter_add_(1, there[drawn], torch.ones_like(weights[:, : len(there)]))


def interval(replicates: Tensor) -> Interval | None:
    """The percentile interval [low, high] of a figure's replicates; None where there are none of it."""
    known = replicates[replicates.isfinite()]
    if not len(known):
        return None
    low, high = known.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=known.dtype, device=known.device))
    return [float(low), float(high)]


def number(value: Tensor | float) -> float | None:
    """A figure for JSON, which has no NaN."""
    found = float(value)
    return found if -float("inf") < found < float("inf") else None


def best(scores: Mapping[str, float | None]) -> str | None:
    """The name with the lowest score, of equals the first; None where none has one."""
    known = {name: score for name, score in scores.items() if score is not None}
    return min(known, key=known.__getitem__) if known else None
