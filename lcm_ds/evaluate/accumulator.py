"""Sums over groups of documents, and from them each metric with a bootstrap confidence interval.

The bootstrap resamples documents, not targets, because targets of one document are alike (Efron & Tibshirani 1993,
chapter 8); with source.group_column it resamples what documents share, such as books. There are at most GROUPS groups,
so that memory does not grow with the dataset. `documents` of the functions are these units.
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
NORMAL = 1.959964  # the normal distribution's quantile of (1 + LEVEL) / 2
# First and last position of each bucket; the last bucket is open.
BUCKETS = ((1, 1), (2, 2), *((2**i + 1, 2 ** (i + 1)) for i in range(1, 9)), (513, None))

Values = dict[str, Tensor]  # name → one value for each row of the weights; NaN without targets
Interval = list[float]  # [low, high]


def bucket_of(positions: Tensor) -> Tensor:
    """Index in BUCKETS of each position (counted from 1): int64 [n]."""
    ends = torch.tensor([last for _, last in BUCKETS if last is not None], device=positions.device)
    return torch.bucketize(positions.contiguous(), ends)


class Accumulator:
    """Sums of one predictor, or of the truth: for means, for variances, and for effective ranks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._means: dict[str, Tensor] = {}  # fp64 [GROUPS, k, 2]: sums and counts
        self._vectors: dict[str, Tensor] = {}  # fp64 [GROUPS, 2 + embed_dim]: counts, squared lengths, sums
        self._spectrum: tuple[Tensor, Tensor, Tensor] | None = None  # counts, sums, sums of outer products

    def add(self, name: str, values: Tensor, documents: Tensor, buckets: Tensor | None = None) -> None:
        """Add values to the mean `name`.

        Args:
            name: of the metric.
            values: [n], one for each target; NaN are not counted.
            documents: int64 [n], the targets' documents.
            buckets: int64 [n], if a mean of each bucket is wanted.
        """
        width = 1 if buckets is None else len(BUCKETS)
        if name not in self._means:
            self._means[name] = torch.zeros(GROUPS, width, 2, dtype=torch.float64, device=self.device)
        known = ~values.isnan()
        index = documents % GROUPS * width + (0 if buckets is None else buckets)
        sums = torch.stack([values.nan_to_num().double(), known.double()], dim=1)
        # In one order on GPUs, too, unlike index_add_.
        self._means[name].view(-1, 2).index_put_((index,), sums, accumulate=True)

    def add_vectors(self, name: str, vectors: Tensor, documents: Tensor) -> None:
        """Add vectors [n, embed_dim] to the variance `name`; documents: int64 [n]."""
        if name not in self._vectors:
            shape = GROUPS, 2 + vectors.shape[1]
            self._vectors[name] = torch.zeros(shape, dtype=torch.float64, device=self.device)
        exact = vectors.double()
        sums = torch.cat([torch.ones_like(exact[:, :1]), exact.square().sum(1, keepdim=True), exact], dim=1)
        self._vectors[name].index_put_((documents % GROUPS,), sums, accumulate=True)

    def add_spectrum(self, vectors: Tensor, documents: Tensor) -> None:
        """Add vectors [n, embed_dim] to the effective rank; documents: int64 [n]."""
        dims = vectors.shape[1]
        if self._spectrum is None:
            counts, sums, products = (
                torch.zeros(SPECTRA, *shape, dtype=torch.float64, device=self.device)
                for shape in ((), (dims,), (dims, dims))
            )
            self._spectrum = counts, sums, products
        counts, sums, products = self._spectrum
        for group in range(SPECTRA):
            members = vectors[documents % SPECTRA == group].double()
            counts[group] += len(members)
            sums[group] += members.sum(0)
            products[group].addmm_(members.T, members)

    def all_reduce(self, ranks: Ranks) -> None:
        """Add the sums of all other ranks; a collective call, with the same names on each rank."""
        ranks.all_reduce([*self._means.values(), *self._vectors.values(), *(self._spectrum or ())])

    @property
    def groups(self) -> Tensor:
        """Which groups have targets: bool [GROUPS]."""
        occupied = torch.zeros(GROUPS, dtype=torch.bool, device=self.device)
        for sums in self._means.values():
            occupied |= sums[..., 1].sum(1) > 0
        return occupied

    def means(self, weights: Tensor) -> Values:
        """Means by name: [replicates], or [replicates, k] of k buckets; weights: fp64 [replicates, GROUPS].

        Replicates of targets of a single group are NaN: they would all be equal, which says nothing of other documents.
        """
        means = {}
        for name, sums in self._means.items():
            total = torch.einsum("rg,gks->rks", weights, sums)
            mean = total[..., 0] / total[..., 1]
            if len(weights) > 1:
                mean[:, (sums[..., 1] > 0).sum(0) < 2] = torch.nan
            means[name] = mean.squeeze(1) if mean.shape[1] == 1 else mean
        return means

    def variances(self, weights: Tensor) -> Values:
        """Variances, summed over dimensions, by name: [replicates]; weights: fp64 [replicates, GROUPS]."""
        sums = {name: weights @ sums for name, sums in self._vectors.items()}
        return {name: variance(each[:, 0], each[:, 2:], each[:, 1]) for name, each in sums.items()}

    def counts(self, name: str) -> Tensor:
        """Number of targets in a mean, for each of its buckets: [k]."""
        return self._means[name][..., 1].sum(0)

    def declare(self, name: str) -> None:
        """A mean that is there although no value has been added, as on a rank that has none."""
        nothing = torch.empty(0, device=self.device)
        self.add(name, nothing, nothing.long())

    def effective_rank(self) -> tuple[float | None, Interval | None]:
        """The effective rank of the vectors, and its interval.

        A replicate's spectrum is taken along the eigenvectors of the full sample, which is right to first order;
        decomposing each replicate would take minutes. Replicates contain some vectors twice and therefore have lower
        ranks: they only give the spread, and the interval is a normal distribution's.
        """
        if self._spectrum is None or not self._spectrum[0].sum() > 0:
            return None, None
        counts, sums, products = self._spectrum
        matrix = covariance(counts.sum(), sums.sum(0), products.sum(0))
        if not matrix.trace() > CONSTANT:
            return None, None
        spectrum, axes = torch.linalg.eigh(matrix)
        estimate, weights = float(rank_of(spectrum)), bootstrap_weights(counts > 0)
        if weights is None:
            return estimate, None
        count = (weights @ counts).unsqueeze(1)
        along = ((products @ axes) * axes).sum(1)  # [SPECTRA, embed_dim]: sums of squares along each axis
        replicates = rank_of(weights @ along / count - (weights @ (sums @ axes) / count).square())
        groups = int((counts > 0).sum())
        spread = NORMAL * float(replicates.std()) * (groups / (groups - 1)) ** 0.5  # a few groups underestimate it
        return estimate, [max(1.0, estimate - spread), estimate + spread]


def bootstrap_weights(groups: Tensor, replicates: int = REPLICATES) -> Tensor | None:
    """How often each group is drawn in each replicate of a bootstrap: fp64 [replicates, len(groups)].

    Args:
        groups: bool, which groups exist. As many are drawn as exist, with replacement; the draw depends on their number
            only.
        replicates: how many.

    Returns:
        The weights; None for fewer than two groups.
    """
    existing = groups.nonzero().flatten()
    if len(existing) < 2:
        return None
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(len(existing), (replicates, len(existing)), generator=generator).to(existing.device)
    weights = torch.zeros(replicates, len(groups), dtype=torch.float64, device=groups.device)
    return weights.scatter_add_(1, existing[drawn], torch.ones_like(weights[:, : len(existing)]))


def interval(replicates: Tensor) -> Interval | None:
    """The percentile interval [low, high] of replicates [n]; None if none is finite."""
    known = replicates[replicates.isfinite()]
    if not len(known):
        return None
    low, high = known.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=known.dtype, device=known.device))
    return [float(low), float(high)]


def json_float(value: Tensor | float) -> float | None:
    """A float, or None if it is not finite: JSON has no NaN."""
    number = float(value)
    return number if -float("inf") < number < float("inf") else None


def best(scores: Mapping[str, float | None]) -> str | None:
    """The name with the lowest score, the first of equals; None if there are no scores."""
    known = {name: score for name, score in scores.items() if score is not None}
    return min(known, key=known.__getitem__) if known else None
