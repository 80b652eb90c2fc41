#!/bin/bash
# PyTorch casts infinity to 448 in float8_e4m3fn, but makes it NaN in float8_e4m3fnuz and keeps it in float8_e5m2.
#
# Versions: torch 2.13.0 (CPU), ml_dtypes 0.6.0, numpy 2.4.6.
# Expected: float8_e4m3fn has no infinity, but it has NaN, which is what infinity becomes in ml_dtypes (NumPy, JAX) and in PyTorch's
#   float8_e4m3fnuz. Whoever knows that casts saturate now (pull request 178817 speaks of finite overflow) expects it of numbers, or of all types.
# What happens: numbers beyond 448 and infinity itself become 448 and stay finite; NaN stays NaN. float8_e5m2 keeps infinity and turns
#   numbers beyond its range into it. torch.full with 500 gives 448 for one element and raises for two.
# Seen:
#   float8_e4m3fn:   torch 500 -> 448, inf -> 448, nan -> nan; ml_dtypes 500 -> nan, inf -> nan, nan -> nan
#   float8_e4m3fnuz: torch 500 -> nan, inf -> nan, nan -> nan; ml_dtypes the same
#   float8_e5m2:     torch 100000 -> inf, inf -> inf, nan -> nan; ml_dtypes the same
#   torch.full: 1 element 448, 2 elements: value cannot be converted to type c10::Float8_e4m3fn without overflow
# Why it matters: loss scaling and guards find a diverged step by its inf and NaN. A cast of activations or gradients to fp8 with a fixed or delayed
#   scale makes an overflow an ordinary large number, so the step counts as good; the same code with ml_dtypes shows NaN.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 ml_dtypes==0.6.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import ml_dtypes
import numpy as np
import torch

def casts(name, large):
    """What both libraries make of a number beyond the range, infinity and NaN."""
    values = [large, float("inf"), float("nan")]
    by_torch = torch.tensor(values).to(getattr(torch, name)).float().tolist()
    with np.errstate(all="ignore"):
        by_numpy = np.array(values, np.float32).astype(getattr(ml_dtypes, name)).astype(np.float32).tolist()
    print(f"{name + ':':16} {values}: torch {by_torch}, ml_dtypes {by_numpy}")
    return str(by_torch), str(by_numpy)

assert casts("float8_e4m3fn", 500.0) == ("[448.0, 448.0, nan]", "[nan, nan, nan]"), "infinity is cast otherwise now"
assert casts("float8_e4m3fnuz", 500.0) == ("[nan, nan, nan]",) * 2
assert casts("float8_e5m2", 1e5) == ("[inf, inf, nan]",) * 2
many = torch.full((1000,), float("-inf"), dtype=torch.bfloat16).to(torch.float8_e4m3fn).float()
assert bool((many == -448).all())
one = torch.full((1,), 500.0, dtype=torch.float8_e4m3fn).float().tolist()
try:
    two = torch.full((2,), 500.0, dtype=torch.float8_e4m3fn).float().tolist()
except RuntimeError as error:
    two = str(error).partition("\n")[0]
print("torch.full: 1 element", one, "2 elements:", two)
assert one == [448.0] and "without overflow" in two, "torch.full treats one and two elements alike now"
PY
