#!/bin/bash
# Building a ZeRO engine with AdamW imports DeepSpeed's Muon, whose kernels are handed to torch.compile.
#
# Versions: deepspeed 0.19.8, torch 2.13.0 (CPU).
# Expected: Muon is imported if the config or the caller asks for it; an engine of AdamW calls torch.compile for nothing.
# What happens: the check of whether ZeRO supports the optimizer imports Muon to compare classes; its functions are decorated
#   with torch.compile, which imports torch's compiler (nothing is compiled before a first call). Without ZeRO it is not so.
# Seen, calls of torch.compile while deepspeed.initialize builds an engine of AdamW:
#   stage 0: 0, Muon imported: False
#   stage 1: 3, Muon imported: True
#   stage 2: 3, Muon imported: True
#   stage 3: 3, Muon imported: True
# Why it matters: every rank of an eager run imports a compiler that it never uses.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet deepspeed==0.19.8 torch==2.13.0 setuptools ninja
cd "$folder"
cat > build.py <<'PYTHON'
import sys

import deepspeed
import torch

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which init_distributed would compile with g++
calls, compile = [], torch.compile
torch.compile = lambda *args, **kwargs: calls.append(args) or compile(*args, **kwargs)
config = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": int(sys.argv[1])},
}
deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
deepspeed.initialize(model=torch.nn.Linear(8, 8), config=config)
muon = "deepspeed.runtime.zero.muon.original_muon" in sys.modules
print(f"found stage {sys.argv[1]}: {len(calls)}, Muon imported: {muon}")
PYTHON
status=0
for expected in "stage 0: 0, Muon imported: False" "stage 1: 3, Muon imported: True" "stage 2: 3, Muon imported: True" \
    "stage 3: 3, Muon imported: True"; do
    stage=${expected:6:1}
    port=$(venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    found=$(RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 \
        PATH="$folder/venv/bin:$PATH" venv/bin/python build.py "$stage" 2>"$folder/err" | grep '^found' | cut -d' ' -f2-)
    echo "$found"
    [ "$found" = "$expected" ] || status=1
done
exit $status
