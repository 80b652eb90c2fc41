#!/bin/bash
# Building an engine in bf16 makes four full garbage collections, which take nearly all of its time.
#
# Versions: deepspeed 0.19.8, torch 2.13.0 (CPU).
# Expected: building an engine allocates its buffers; Python collects garbage when its own thresholds say so.
# What happens: BF16_Optimizer (ZeRO 1 with gradients in fp32) and the optimizers of other stages report memory with
#   see_memory_usage(…, force=True), whatever wall_clock_breakdown or the log level is. It calls gc.collect() each time, which
#   goes through all objects of torch and DeepSpeed. By the source, ranks other than 0 return before that, and so wait at the
#   next collective. Measured for ZeRO 1 and one rank.
# Seen:
#   full collections asked for by see_memory_usage: 4
#   share of the time of deepspeed.initialize: 0.986
#   time in collections after gc.freeze(), of that before: 0.0001
# Why it matters: each start waits for it; gc.freeze() before the engine is built saves that time.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet deepspeed==0.19.8 torch==2.13.0 setuptools ninja
cd "$folder"
cat > build.py <<'PYTHON'
import gc
import sys
import time

import deepspeed
import torch

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles nothing when it joins
deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
seconds, started, count = 0.0, 0.0, 0


def watch(phase, info):
    global seconds, started, count
    if info["generation"] != 2:
        return
    caller, names = sys._getframe(1), []
    while caller is not None:
        names.append(caller.f_code.co_name)
        caller = caller.f_back
    if "see_memory_usage" not in names:
        return
    if phase == "start":
        started = time.perf_counter()
    else:
        seconds += time.perf_counter() - started
        count += 1


config = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
}
gc.callbacks.append(watch)


def build():
    global seconds, count
    seconds, count = 0.0, 0
    begun = time.perf_counter()
    deepspeed.initialize(model=torch.nn.Linear(64, 64), config=config)
    return count, seconds, time.perf_counter() - begun


build()  # lazy imports
count, collecting, whole = build()
gc.freeze()
_, frozen, _ = build()
print(count, collecting / whole, frozen / collecting, file=open(sys.argv[1], "w"))
PYTHON
port=$(venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 \
    PATH="$folder/venv/bin:$PATH" venv/bin/python build.py seen.txt > out.txt 2>&1 || { cat out.txt; exit 1; }
read -r count share frozen < seen.txt
echo "full collections asked for by see_memory_usage: $count"
echo "share of the time of deepspeed.initialize: $share"
echo "time in collections after gc.freeze(), of that before: $frozen"
venv/bin/python -c "import sys; sys.exit(not ($count >= 4 and $share > 1 / 3 and $frozen < 0.5))"
