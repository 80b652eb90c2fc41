#!/bin/bash
# On CPUs torch's norm of many fp32 values is too small: by a hundredth for 100 million normal values.
#
# Versions: torch 2.13.0 (CPU).
# Expected: a norm as exact as torch's sum, which adds up blocks (relative error some 1e-7).
# What happens: torch.linalg.vector_norm, Tensor.norm and torch._foreach_norm add up squares one after the other in a few
#   fp32 lanes, whose rounding does not cancel out. x.square().sum().sqrt() of the same values is exact to 1e-6,
#   and so is the norm in fp64.
# Seen, relative errors for 1, 16 and 100 million normal values on a CPU with avx512 (more lanes, smaller errors):
#   vector_norm -1e-05 -6e-04 -1e-02; clip_grad_norm_ returns the same
# Why it matters: gradients are clipped by such norms (clip_grad_norm_, DeepSpeed's BF16_Optimizer).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/norms.py" <<'PYTHON'
import sys

import torch

sizes, errors, of_sums = (1 << 20, 1 << 24, 100_000_000), [], []
for size in sizes:
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.vector_norm(x, dtype=torch.float64).item()
    errors.append(torch.linalg.vector_norm(x).item() / exact - 1)
    of_sums.append(x.square().sum().sqrt().item() / exact - 1)
x = torch.nn.Parameter(x)
x.grad = x.data
clipped = torch.nn.utils.clip_grad_norm_([x], 1e9).item() / exact - 1
print("vector_norm " + " ".join(f"{error:.0e}" for error in errors) + f"; clip_grad_norm_ {clipped:.0e}")
print("square().sum().sqrt() " + " ".join(f"{error:.0e}" for error in of_sums))
as_seen = errors[1] < -1e-4 and errors[2] < -2e-3 and clipped < -2e-3 and max(map(abs, of_sums)) < 1e-6
sys.exit(not as_seen)
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/norms.py"
