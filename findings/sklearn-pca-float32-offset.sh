#!/bin/bash
# scikit-learn's PCA of 20,000 float32 rows computes a variance between 0 and 50 where it is 1; of 600 rows it does not.
#
# Versions: scikit-learn 1.9.1, numpy 2.4.6.
# Expected: PCA centres its input, so a constant added to one dimension changes nothing, and more rows make the result better. The
#   documentation warns that the solver "covariance_eigh" suffers from a wide range of singular values, which these rows do not have.
# What happens: from ten rows a dimension on (and up to 1,000 dimensions; so its documentation) the default picks "covariance_eigh". It does not centre the rows,
#   but subtracts n times the product of the means from the uncentred products, in the type of the rows. In float32 the variance of a
#   dimension with a mean of 2,000 and a deviation of 1 is lost in this difference: it becomes the first component by far, or none.
#   "full", float64 and rows that were centred before give the right result.
# Seen (four samples of 64 dimensions of variance 1, the first one around 2,000; its variance as the components have it):
#   600 rows, default (full):               1.0 1.0 1.0 1.0
#   20,000 rows, default (covariance_eigh): 0.0 0.0 49.2 12.0
#   20,000 rows, full; in float64; centred before: 1.0 1.0 1.0 1.0
# Why it matters: hidden states of language models have single dimensions of such means, and so have the embeddings of encoders without a last
#   normalisation. Whitening, effective rank and "share of variance explained" then describe that dimension's rounding.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet scikit-learn==1.9.1 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import numpy as np
from sklearn.decomposition import PCA

def rows(count, seed):
    values = np.random.default_rng(seed).normal(size=(count, 64))
    values[:, 0] += 2000
    return values.astype(np.float32)

def share(values, **options):
    """The first dimension's variance by its components, over its true variance."""
    pca = PCA(**options).fit(values)
    variance = float((pca.components_[:, 0] ** 2 * pca.explained_variance_).sum())
    return pca._fit_svd_solver, variance / float(values[:, 0].astype(np.float64).var(ddof=1))

cases = {
    "600 rows, default": lambda seed: share(rows(600, seed)),
    "20,000 rows, default": lambda seed: share(rows(20_000, seed)),
    "20,000 rows, full": lambda seed: share(rows(20_000, seed), svd_solver="full"),
    "20,000 rows, float64": lambda seed: share(rows(20_000, seed).astype(np.float64)),
    "20,000 rows, centred before": lambda seed: share(rows(20_000, seed) - rows(20_000, seed).mean(axis=0)),
}
for name, case in cases.items():
    results = [case(seed) for seed in range(4)]
    solver, found = results[0][0], [value for _, value in results]
    print(f"{name} ({solver}): {[round(value, 1) for value in found]}")
    if name == "20,000 rows, default":
        assert solver == "covariance_eigh"
        assert sum(abs(value - 1) > 0.5 for value in found) >= 3, "the rows are centred now"
    else:
        assert all(abs(value - 1) < 0.01 for value in found)
PY
