#!/bin/bash
# torch.distributed.all_reduce(MAX or MIN) over gloo keeps a NaN of one rank and loses a NaN of another.
#
# Versions: torch 2.13.0 (CPU, gloo).
# Expected: the maximum of values that include NaN is NaN, as with torch.max, torch.maximum and numpy.max; if not, then at least the
#   same answer whichever rank holds the NaN. The documentation of ReduceOp mentions no such thing.
# What happens: gloo reduces with a plain comparison, which is false for NaN. With two ranks, a NaN on rank 0 reaches both ranks;
#   a NaN on rank 1 disappears on both, and each gets rank 0's number. fp32 and bf16 alike.
# Seen:
#   float32: NaN on rank 0 -> MAX nan, MIN nan; NaN on rank 1 -> MAX 1.0, MIN 1.0
#   bfloat16: the same
# Why it matters: "has any rank a non-finite loss or gradient norm?" is often answered by a MAX over the ranks' values. Over
#   gloo this check misses rank 1's NaN, while a test that puts the NaN on rank 0 passes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$work/reduce.py" <<'PY'
import math
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

def reduced(rank, bad, dtype, op):
    value = torch.tensor([math.nan if rank == bad else rank + 1.0], dtype=dtype)
    dist.all_reduce(value, op=op)
    return value.item()

def run(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for dtype in (torch.float32, torch.bfloat16):
        seen = [[reduced(rank, bad, dtype, op) for op in (dist.ReduceOp.MAX, dist.ReduceOp.MIN)] for bad in (0, 1)]
        if rank == 0:
            print(f"{dtype}: NaN on rank 0 -> MAX, MIN {seen[0]}; NaN on rank 1 -> MAX, MIN {seen[1]}", flush=True)
        assert all(math.isnan(value) for value in seen[0]), "the NaN of rank 0 is lost"
        assert seen[1] == [1.0, 1.0], "the NaN of rank 1 now counts"
    assert math.isnan(torch.tensor([math.nan, 1.0]).max()) and math.isnan(torch.tensor([1.0, math.nan]).max())
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(run, (sys.argv[1],), nprocs=2)
PY
GLOO_SOCKET_IFNAME=lo "$work/venv/bin/python" "$work/reduce.py" "$work"
