#!/bin/bash
# A mask from torch.rand in bfloat16 hits about three times as often as asked for.
#
# Versions: torch 2.13.0 (CPU).
# Expected: torch.rand is uniform on [0, 1), so a share p of the values is below p, to within bfloat16's precision: 0.001 has a
#   relative precision of 0.4 % there. dropout and bernoulli in bfloat16 keep the share.
# What happens: the numbers lie on a grid of 1/256 (near 0, slightly finer values are rare), rounded down. 1 of some 500 values is exactly
#   0, which never happens in practice in fp32, and every p below 1/256 gives a share far too large. The mean is 0.498.
# Seen:
#   share below 0.001: fp32 0.0010, bfloat16 0.0029; below 0.0001: fp32 0.0001, bfloat16 0.0021; dropout(0.001) in bfloat16: 0.0010
# Why it matters: `torch.rand_like(x) < p` is how rows are masked, conditions dropped (classifier-free guidance) and tokens sampled. It takes
#   the type of x, so the same line masks another share once a model is cast to bfloat16. -log(rand) and logit(rand) become infinite.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import torch

torch.manual_seed(0)
count = 4_000_000
draws = {dtype: torch.rand_like(torch.zeros(count, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)}
for p in (0.001, 0.0001):
    share = {dtype: (values < p).float().mean().item() for dtype, values in draws.items()}
    print(f"share below {p}:", share)
    assert 0.8 * p < share[torch.float32] < 1.2 * p
    assert share[torch.bfloat16] > 2 * p, "rand in bfloat16 is as fine as fp32's now"
half = draws[torch.bfloat16]
zeros = (half == 0).float().mean().item()
print("exact zeros in bfloat16", zeros, "mean", half.float().mean().item())
assert zeros > 0.001 and half.float().mean() < 0.499 and torch.isinf(-half.log()).any()
dropped = (torch.nn.functional.dropout(torch.ones(count, dtype=torch.bfloat16), 0.001) == 0).float().mean().item()
print("dropout(0.001) in bfloat16 drops", dropped)
assert 0.0008 < dropped < 0.0012
PY
