#!/bin/bash
# DeepSpeed: after one step that is not finite, ZeRO 2 with offloading and fp32 accumulation never takes a step again.
#
# Versions: deepspeed 0.19.8, torch 2.13.0 (CPU, gloo, one rank; DeepSpeed builds a kernel, so g++ is needed).
# Expected: a step whose gradient is not finite is skipped, and the next ones, whose gradients are, change the weights.
# What happens: with "offload_optimizer": {"device": "cpu"} and data_types.grad_accum_dtype "fp32" the first skipped step leaves its
#   gradient in the buffer on the CPU, to which the next ones are added: all later steps are skipped, too. engine.step() returns as
#   usual, skipped_steps counts on. Without offloading, or with bf16 accumulation, one step is skipped.
# Seen (weights changed in steps 1 to 5; the input of step 2 is infinite):
#   no offload, fp32: yes no yes yes yes · offload, bf16: yes no yes yes yes · offload, fp32: yes no no no no
# Why it matters: one bad document or an overflow ends training silently; the loss goes on being logged, and no longer changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 deepspeed==0.19.8 numpy==2.4.6
cat > "$work/skip.py" <<'PY'
import logging

import deepspeed
import torch

logging.disable(logging.WARNING)
deepspeed.init_distributed("gloo")


def changed(offload, accumulate_in):
    """Whether each of five steps changed the weights."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": accumulate_in},
        "zero_optimization": {"stage": 2} | ({"offload_optimizer": {"device": "cpu"}} if offload else {}),
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,
    }
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    result = []
    for step in range(5):
        before = model.weight.detach().clone()
        inputs = torch.full((1, 4), float("inf") if step == 1 else 1.0, dtype=torch.bfloat16)
        engine.backward(engine(inputs).float().mean())
        engine.step()
        result.append("no" if torch.equal(before, model.weight) else "yes")
    return " ".join(result)


found = {name: changed(*case) for name, case in {
    "no offload, fp32": (False, "fp32"), "offload, bf16": (True, "bf16"), "offload, fp32": (True, "fp32"),
}.items()}
print(" · ".join(f"{name}: {steps}" for name, steps in found.items()))
assert found["no offload, fp32"] == found["offload, bf16"] == "yes no yes yes yes"
assert found["offload, fp32"] == "yes no no no no", "later steps are taken now"
PY
TORCH_EXTENSIONS_DIR="$work/extensions" RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29533 DS_ACCELERATOR=cpu GLOO_SOCKET_IFNAME=lo \
  "$work/venv/bin/python" "$work/skip.py" 2>&1 | grep ' · '
