#!/bin/bash
# numpy's sum over the rows of a float16 matrix stops at 2048, its standard deviation is inf, and its mean is right.
#
# Versions: numpy 2.4.6.
# Expected: mean, sum and std of one array agree with each other (sum = n * mean), or a warning tells of the overflow. The documentation
#   of mean() promises float32 intermediates for float16; a reader takes this for the rule of float16 reductions.
# What happens: only mean() does so. sum(axis=0) adds row after row in float16 and no longer moves once the total is 2048 times the
#   addend: no overflow, so no warning. The same numbers summed along contiguous memory are right, because those are summed
#   pairwise. std() of more than 65,504 standard normal values is inf.
# Seen:
#   10,000 rows of ones: sum(axis=0) 2048.0, sum of the transposed copy (axis=1) 10000.0, mean(axis=0) 1.0; std of 100,000 normal values inf
# Why it matters: statistics per dimension of float16 embeddings (a normaliser's mean and scale, counts of a mask) are sums over rows, the
#   slow axis. sum(axis=0) / n gives 0.2 where mean(axis=0) gives 1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import warnings

import numpy as np

ones = np.ones((10_000, 4), np.float16)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    down, along, mean = ones.sum(axis=0), np.ascontiguousarray(ones.T).sum(axis=1), ones.mean(axis=0)
print("sum(axis=0)", down, "sum(axis=1) of the transposed copy", along, "mean(axis=0)", mean)
assert (down == 2048).all(), "sum(axis=0) no longer stalls"
assert (along == 10_000).all() and (mean == 1).all()
normal = np.random.default_rng(0).normal(size=100_000).astype(np.float16)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    spread = normal.std()
print("std of 100,000 normal values", spread, "in float32", normal.std(dtype=np.float32), "mean", normal.mean())
assert np.isinf(spread), "std() of float16 is finite now"
assert abs(normal.std(dtype=np.float32) - 1) < 0.01 and abs(normal.mean()) < 0.02
PY
