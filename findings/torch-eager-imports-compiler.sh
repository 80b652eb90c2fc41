#!/bin/bash
# Eager training imports torch's compiler, and its exporter to ONNX, without compiling anything.
#
# Versions: torch 2.13.0 (CPU).
# Expected: torch._dynamo, torch._inductor, torch.onnx and sympy are imported when something calls torch.compile or an
#   exporter; filling a tensor on the meta device, which has no values, does nothing.
# What happens: a function that torch keeps out of compiled code imports the compiler at its first call, to say so. Such are
#   add_param_group, which the constructor of every optimizer calls, and a custom operator. An in-place normal_ on the meta
#   device goes through torch._refs, which imports it too; uniform_, which fills a new Linear, does not.
# Seen:
#   nothing: none
#   update by hand: none
#   SGD: torch._dynamo torch._inductor torch.onnx sympy
#   AdamW: torch._dynamo torch._inductor torch.onnx sympy
#   custom_op: torch._dynamo torch._inductor torch.onnx sympy
#   define and impl: none
#   meta Linear: none
#   meta normal_: torch._dynamo torch._inductor torch.onnx sympy
#   empty_like of meta: sympy
# Why it matters: each rank of an eager run imports some 800 modules at its start that it never uses.
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
