#!/bin/bash
# torch.distributed.all_reduce of a bool tensor over gloo adds bytes: a flag that is true on all ranks becomes False after some sums.
#
# Versions: torch 2.13.0 (CPU, gloo, two ranks).
# Expected: the sum of bools is "any of them", as with NCCL, for which PyTorch takes MAX (pull request 41959), or it is refused. True on
#   all ranks stays True.
# What happens: gloo adds the bytes behind the bools. The tensor prints True while its byte is 2, 4, 8 …; at 256 the byte is 0 and the tensor
#   False. With two ranks that is the eighth all_reduce of the same tensor, with 16 the second, with 256 ranks the first. SUM is the
#   default of all_reduce. MAX and BOR give bytes 0 and 1.
# Seen (a tensor that is True on both ranks):
#   SUM: bytes [2, 4, 8, 16, 32, 64, 128, 0], so [True, True, True, True, True, True, True, False]
#   MAX: bytes [1, 1, 1, 1, 1, 1, 1, 1]
# Why it matters: "a signal has come" or "a rank has no more data" is kept in one tensor and agreed on at each step. Over gloo, in tests
#   without GPUs and in groups for the CPU beside NCCL, the flag that was set is lost some steps later.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$work/flags.py" <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

def run(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for op, expected in (("SUM", [2, 4, 8, 16, 32, 64, 128, 0]), ("MAX", [1] * 8), ("BOR", [1] * 8)):
        flag = torch.tensor([True])
        flags, data = [], []
        for _ in range(8):
            dist.all_reduce(flag, op=getattr(dist.ReduceOp, op))
            flags.append(flag.item())
            data.append(flag.view(torch.uint8).item())
        if rank == 0:
            print(f"{op}: bytes {data}, flags {flags}", flush=True)
        assert data == expected, f"{op} of bools gives other bytes now"
        assert flags == [byte != 0 for byte in expected]
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(run, (sys.argv[1],), nprocs=2)
PY
GLOO_SOCKET_IFNAME=lo "$work/venv/bin/python" "$work/flags.py" "$work"
