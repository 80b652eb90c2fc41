#!/bin/bash
# torch.compile drops an explicit cast to bfloat16 or float16 and back: code that returns a rounded number and its error gets an error of 0.
#
# Versions: torch 2.13.0 (CPU; Inductor needs g++).
# Expected: `x - x.bfloat16().float()` is the error of rounding x to bfloat16, compiled or not. What Inductor says of its setting
#   emulate_precision_casts is that casts between two fused operations in low precision may go, which serves accuracy.
# What happens: a cast to bfloat16 or float16 and back that stays within one loop is taken for nothing, also where the program asks for
#   it explicitly. A result in bfloat16 that leaves the loop is rounded: one function then returns the rounded number and, as
#   its error, 0. Casts to float8 are kept. (Upstream: pytorch issues 176565 and 185337; by default unchanged.)
# Seen:
#   error feedback, largest remainder: eager 0.0155, compiled 0.0000, true error of the returned numbers 0.0155
#   70000 in float16 is infinite: eager True, compiled False
#   1 / 3 by way of float8_e4m3fn: eager and compiled the same
#   with emulate_precision_casts: as eager
# Why it matters: error feedback (compressed gradients, masters kept as a bfloat16 number and a remainder) does nothing when compiled, and
#   checks for float16's range pass. Nothing is raised.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$work/rounding.py" <<'PY'
import torch
from torch._inductor import config

def feed_back(x):
    sent = x.bfloat16()
    return sent, x - sent.float()

def overflows(x):
    return x.half().isinf()

def through_float8(x):
    return x.to(torch.float8_e4m3fn).float()

torch.manual_seed(0)
x = 8 * torch.rand(1000)
large = torch.full((1000,), 70000.0)
third = torch.full((1000,), 1 / 3)
for emulate in (False, True):
    config.emulate_precision_casts = emulate
    torch._dynamo.reset()
    remainder = feed_back(x)[1]
    sent, compiled = torch.compile(feed_back)(x)
    true = x - sent.float()
    print(f"emulate_precision_casts {emulate}: largest remainder", *(f"{name} {float(value.abs().max()):.4f}" for name, value in
          {"eager": remainder, "compiled": compiled, "true": true}.items()))
    infinite = bool(torch.compile(overflows)(large).all())
    print(f"  70000 in float16 is infinite: eager {bool(overflows(large).all())}, compiled {infinite}")
    assert torch.equal(remainder, true) and bool(remainder.any())
    assert bool(compiled.any()) is emulate and infinite is emulate, "compiled code rounds otherwise now"
    assert torch.equal(torch.compile(through_float8)(third), through_float8(third)), "float8 is no longer kept"
PY
TORCHINDUCTOR_CACHE_DIR="$work/inductor" "$work/venv/bin/python" "$work/rounding.py"
