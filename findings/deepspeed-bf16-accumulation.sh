#!/bin/bash
# DeepSpeed with bf16 averages the gradients of 512 equal micro-batches to half of their mean.
#
# Versions: deepspeed 0.19.8, torch 2.13.0 (CPU, gloo, one rank; DeepSpeed builds a kernel, so g++ is needed).
# Expected: the mean of 512 equal gradients is that gradient, whatever gradient_accumulation_steps is.
# What happens: with bf16 enabled and nothing said of data_types.grad_accum_dtype, ZeRO 1 and 2 add each micro-batch's gradient / 512 in
#   bfloat16. With 8 bits of mantissa the sum stops moving halfway: the next addend is below half of its last digit. Every later
#   micro-batch counts for nothing. No warning, and get_global_grad_norm() reports the halved norm as the true one.
# Seen:
#   stage 1, 1 micro-batch: 1.118; 512 micro-batches: 0.559; the same with grad_accum_dtype fp32: 1.118
# Why it matters: large effective batches on few devices are made in this way. Adam hides the constant factor, clipping (set for the true norm)
#   does not act, and in real data the late micro-batches of each step are those that are lost.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 deepspeed==0.19.8 numpy==2.4.6
cat > "$work/accumulate.py" <<'PY'
import logging

import deepspeed
import torch

logging.disable(logging.WARNING)
deepspeed.init_distributed("gloo")

def norm(steps, accumulate_in=None):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": steps,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
    }
    if accumulate_in:
        config["data_types"] = {"grad_accum_dtype": accumulate_in}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    for _ in range(steps):
        engine.backward(engine(torch.ones(1, 4, dtype=torch.bfloat16)).float().mean())
        engine.step()
    return float(engine.get_global_grad_norm())

once, many, exact = norm(1), norm(512), norm(512, "fp32")
print(f"norm of the mean gradient: 1 micro-batch {once:.3f}; 512 equal ones {many:.3f}; in fp32 {exact:.3f}")
assert abs(once - 20**0.5 / 4) < 0.01 and abs(exact - once) < 0.01
assert abs(many - once / 2) < 0.01, "bf16 accumulation keeps the mean now"
PY
TORCH_EXTENSIONS_DIR="$work/extensions" RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29531 DS_ACCELERATOR=cpu GLOO_SOCKET_IFNAME=lo \
  "$work/venv/bin/python" "$work/accumulate.py"
