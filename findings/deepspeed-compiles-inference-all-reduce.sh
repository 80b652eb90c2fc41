#!/bin/bash
# Joining ranks on CPUs compiles an all-reduce of tensor-parallel inference with g++, which training never calls.
#
# Versions: deepspeed 0.19.8, torch 2.13.0 (CPU).
# Expected: deepspeed.init_distributed joins the ranks; an operator is compiled when something first calls it.
# What happens: TorchBackend loads ShareMemCommBuilder before it joins, whatever follows. The operator serves inference_all_reduce
#   alone: ZeRO 1, 2 and 3 exchange gradients and parameters without it. The first start in an environment waits for the
#   compiler (40 s on two cores; each other rank of the host waits for the lock), and a machine without g++ cannot train.
# Seen:
#   compiled by init_distributed: deepspeed_shm_comm
#   calls of the operator in 3 steps of ZeRO 1: 0
#   calls of the operator in 3 steps of ZeRO 2: 0
#   calls of the operator in 3 steps of ZeRO 3: 0
#   marked as not compatible: compiled nothing, the same losses
# Why it matters: setting deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False before joining saves the wait, and g++.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet deepspeed==0.19.8 torch==2.13.0 setuptools ninja
cd "$folder"
cat > train.py <<'PYTHON'
import sys

import deepspeed
import torch

stage, leave_out = int(sys.argv[1]), sys.argv[2] == "without"
if leave_out:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
calls = 0
backend = deepspeed.comm.comm.cdb
original = backend.inference_all_reduce


def counted(*args, **kwargs):
    global calls
    calls += 1
    return original(*args, **kwargs)


backend.inference_all_reduce = counted
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
config = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": stage},
}
engine, *_ = deepspeed.initialize(model=model, config=config)
torch.manual_seed(1 + deepspeed.comm.get_rank())
losses = []
for _ in range(3):
    loss = engine(torch.randn(4, 64)).square().mean()
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
if deepspeed.comm.get_rank() == 0:
    print("calls", calls, "losses", *losses)
PYTHON
train() {  # STAGE with|without: rank 0's line
    local port pids=() rank
    port=$(venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    for rank in 0 1; do
        RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 \
            PATH="$folder/venv/bin:$PATH" TORCH_EXTENSIONS_DIR="$folder/$2" \
            venv/bin/python train.py "$1" "$2" > "rank$rank.txt" 2> "rank$rank.err" &
        pids+=($!)
    done
    for rank in 0 1; do wait "${pids[rank]}"; done
    grep '^calls' rank0.txt
}
status=0
declare -A with
for stage in 1 2 3; do
    with[$stage]=$(train $stage with)
    calls=$(cut -d' ' -f2 <<< "${with[$stage]}")
    echo "calls of the operator in 3 steps of ZeRO $stage: $calls"
    [ "$calls" = 0 ] || status=1
done
compiled=$(ls with)
echo "compiled by init_distributed: $compiled"
[ "$compiled" = deepspeed_shm_comm ] || status=1
for stage in 1 2 3; do
    [ "$(train $stage without)" = "${with[$stage]}" ] || status=1
done
[ ! -e without ] && echo "marked as not compatible: compiled nothing, the same losses" || status=1
exit $status
