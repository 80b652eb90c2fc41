#!/bin/bash
# reduce_scatter over gloo sends as much as an all-reduce, twice what a part for each rank takes; reduce() sends still more.
#
# Versions: torch 2.13.0 (CPU).
# Expected: to sum a tensor of n bytes over r ranks, each keeping one part, each rank sends (r - 1) / r of it; an all-reduce
#   sends that twice. On two ranks of one host, n bytes and 2 n bytes go through the loopback.
# What happens: ProcessGroupGloo sums everything everywhere and copies the part out of it.
# Seen, bytes on the loopback over bytes of the tensor, two ranks:
#   all_reduce 2.0, reduce_scatter 2.0, reduce 2.5, all_to_all_single 1.0, all_gather 1.0
# Why it matters: ZeRO 2 and 3 partition gradients by reduce-scatter. An all_to_all_single of the parts, which each rank
#   then adds up, sends half.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/count.py" <<'PYTHON'
import socket
import sys
import time
import warnings

import torch
import torch.distributed as dist

warnings.simplefilter("ignore")
RANKS, SIZE = 2, 1 << 25
EXPECTED = {"all_reduce": 2.0, "reduce_scatter": 2.0, "reduce": 2.5, "all_to_all_single": 1.0, "all_gather": 1.0}


def on_loopback():
    time.sleep(0.2)
    with open("/proc/net/dev") as lines:
        return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def run(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    whole, other, part = torch.ones(SIZE), torch.empty(SIZE), torch.ones(SIZE // RANKS)
    ways = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "reduce": lambda: dist.reduce(whole, 0),
        "all_to_all_single": lambda: dist.all_to_all_single(other, whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
    }
    found = {}
    for name, way in ways.items():
        dist.barrier()
        before = on_loopback()
        dist.barrier()
        way()
        dist.barrier()
        found[name] = round((on_loopback() - before) / whole.nbytes, 1)
    if rank == 0:
        print(", ".join(f"{name} {ratio}" for name, ratio in found.items()))
        sys.exit(found != EXPECTED)


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    torch.multiprocessing.start_processes(run, (port,), nprocs=RANKS, start_method="spawn")
PYTHON
OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo "$folder/venv/bin/python" "$folder/count.py"
