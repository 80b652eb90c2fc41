#!/bin/bash
# scikit-learn's normalize() returns zero vectors for float16 rows whose norm is above 256, and leaves short rows as they are.
#
# Versions: scikit-learn 1.9.1, numpy 2.4.6.
# Expected: every row that is not zero has norm 1 afterwards. float16 is an accepted input type, and cosine_similarity of the same rows is right.
# What happens: the squares are summed in float16. Above 65,504 the sum is inf and the row is divided by it: all zeros. For small
#   values the squares round to 0, the norm counts as that of a zero row and the row is returned unscaled. No error, no warning.
# Seen:
#   1024 values of 10:     norm 320    -> norm after normalize 0.0     (cosine with itself 1.0)
#   1024 values of 0.0001: norm 0.0032 -> norm after normalize 0.0032  (cosine with itself 1.0)
# Why it matters: embeddings are stored in float16 to halve the disk. Hidden states of language models have norms of hundreds, SONAR-like
#   ones have values near 0.006. A zero vector has similarity 0 with everything: the row drops out of every search and cluster.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet scikit-learn==1.9.1 numpy==2.4.6
"$work/venv/bin/python" -W error - <<'PY'
import numpy as np
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.preprocessing import normalize

def norm(rows):
    return float(np.linalg.norm(rows.astype(np.float64), axis=1)[0])

for value, after in ((10.0, 0.0), (1e-4, None)):
    rows = np.full((1, 1024), value, np.float16)
    scaled = normalize(rows)
    print(f"1024 values of {value}: norm {norm(rows):.4f}, after normalize {norm(scaled):.4f} ({scaled.dtype}), "
          f"cosine with itself {cosine_similarity(rows)[0, 0]:.4f}")
    assert abs(cosine_similarity(rows)[0, 0] - 1) < 1e-3
    assert abs(norm(scaled) - (norm(rows) if after is None else after)) < 1e-6, "float16 rows are normalised now"
    assert abs(norm(normalize(rows.astype(np.float32))) - 1) < 1e-5
PY
