#!/bin/bash
# DeepSpeed's safe_get_full_fp32_param returns another parameter's values under round_robin_gradients.
#
# Versions: deepspeed 0.19.8, torch 2.13.0 (CPU, gloo, two ranks; DeepSpeed builds a kernel, so g++ is needed).
# Expected: the fp32 master of a bf16 parameter rounds to that parameter, before any step and whatever the gradients' order is.
# What happens: with ZeRO 2, bf16, two ranks and zero_optimization.round_robin_gradients, the parameters are laid out in another order than the
#   one in which the links to their masters are made. Of four layers of the same size two get each other's masters. The same links tell
#   the conversion to universal checkpoints where a parameter lies, so that a run resumed from one starts with mixed-up weights. There is no
#   warning, for the shapes fit.
# Seen:
#   round_robin_gradients False: masters that round to their own weights: [True, True, True, True]
#   round_robin_gradients True: masters that round to their own weights: [True, False, False, True]
# Why it matters: this function is the documented way to read fp32 weights in training, and universal checkpoints are the way to
#   another number of ranks.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 deepspeed==0.19.8 numpy==2.4.6
cat > "$work/masters.py" <<'PY'
import logging
import os

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

logging.disable(logging.WARNING)
deepspeed.init_distributed("gloo")

def own_masters(round_robin):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(8, 8, bias=False) for _ in range(4)])
    config = {
        "train_batch_size": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "round_robin_gradients": round_robin},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    own = [torch.equal(safe_get_full_fp32_param(p).bfloat16(), p.detach()) for p in engine.module.parameters()]
    if os.environ["RANK"] == "0":
        print(f"round_robin_gradients {round_robin}: masters that round to their own weights: {own}", flush=True)
    return own

assert all(own_masters(False))
assert own_masters(True) == [True, False, False, True], "the masters are in another order now"
PY
TORCH_EXTENSIONS_DIR="$work/extensions" PATH="$work/venv/bin:$PATH" DS_ACCELERATOR=cpu GLOO_SOCKET_IFNAME=lo \
  "$work/venv/bin/torchrun" --nproc-per-node 2 --master-addr 127.0.0.1 --master-port 29537 "$work/masters.py"
