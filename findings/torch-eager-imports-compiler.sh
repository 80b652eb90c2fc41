#!/bin/bash
# Eager training imports torch's compiler, and its exporter to ONNX, without compiling anything.
#
# Versions: torch 2.13.0 (CPU).
# Expected: torch._dynamo, torch._inductor, torch.onnx and sympy are imported when something calls torch.compile or an
#   exporter; filling a tensor on the meta device, which has no values, does nothing.
# What happens: a function that torch keeps out of compiled code imports the compiler at its first call, to say so. Such are
#   the constructor of every optimizer (by add_param_group), zero_grad and a custom operator. An in-place normal_ on the
#   meta device goes through torch._refs, which imports it too; uniform_, zeros and ones do not. Each takes as long as a
#   third to two thirds of `import torch` once more, and its memory in every process.
# Seen, of torch._dynamo, torch._inductor, torch.onnx, sympy:
#   import torch: none
#   forward, backward, in-place update by hand: none
#   torch.optim.SGD(...): all four
#   torch.optim.AdamW(...): all four
#   an operator of torch.library.custom_op: all four
#   the same operator of torch.library.define and impl: none
#   torch.nn.Linear(3, 3, device="meta"): none
#   torch.nn.init.normal_ of a meta tensor: all four
#   torch.empty_like of a meta tensor, device="cpu": sympy
# Why it matters: a short run or a test with many ranks on one host spends a good part of its start on it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy setuptools
cd "$folder"
cat > imports.py <<'PYTHON'
import sys

import torch

what = sys.argv[1]
weight = torch.nn.Parameter(torch.ones(3))
if what == "update by hand":
    weight.square().sum().backward()
    with torch.no_grad():
        weight -= 0.1 * weight.grad
elif what in ("SGD", "AdamW"):
    getattr(torch.optim, what)([weight], lr=0.1)
elif what == "custom_op":

    @torch.library.custom_op("finding::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    double(torch.ones(3))
elif what == "define and impl":
    torch.library.define("finding::double", "(Tensor x) -> Tensor")
    torch.library.impl("finding::double", "default", lambda x: x * 2)
    torch.ops.finding.double(torch.ones(3))
elif what == "meta Linear":
    torch.nn.Linear(3, 3, device="meta")
elif what == "meta normal_":
    torch.nn.init.normal_(torch.empty(3, device="meta"))
elif what == "empty_like of meta":
    torch.empty_like(torch.empty(3, device="meta"), device="cpu")
print(*(name for name in ("torch._dynamo", "torch._inductor", "torch.onnx", "sympy") if name in sys.modules))
PYTHON
all="torch._dynamo torch._inductor torch.onnx sympy"
changed=
while read -r expected what; do
    case $expected in none) expected="" ;; all) expected=$all ;; esac
    found=$("$folder/venv/bin/python" imports.py "$what")
    echo "$what: ${found:-none}"
    [ "$found" = "$expected" ] || changed=yes
done <<'CASES'
none nothing
none update by hand
all SGD
all AdamW
all custom_op
none define and impl
none meta Linear
all meta normal_
sympy empty_like of meta
CASES
[ -z "$changed" ] || { echo "changed"; exit 1; }
