#!/bin/bash
# DeepSpeed's zero_to_fp32 refuses the checkpoints that ZeRO stage 1 with bf16 and fp32 accumulation writes.
#
# Versions: deepspeed 0.19.8, torch 2.13.0 (CPU, gloo, one rank; DeepSpeed builds a kernel, so g++ is needed).
# Expected: save_checkpoint copies zero_to_fp32.py into each ZeRO checkpoint's folder, to turn it into fp32 weights. So it can read this checkpoint.
# What happens: bf16 with data_types.grad_accum_dtype fp32 (the remedy for bf16 accumulation) takes another optimizer class at stage 1,
#   BF16_Optimizer, whose files lack the entry that says which stage they are. The same config at stage 2, or without the entry
#   grad_accum_dtype at stage 1, gives files that can be read.
# Seen:
#   stage 1, fp32 accumulation: BF16_Optimizer, ValueError ... is not a zero checkpoint; stage 1 without and stage 2 with: converted
# Why it matters: that a run's weights cannot be taken out in the documented way shows at its end, after weeks. The config is valid, training
#   and resuming work, and the script that fails lies in the checkpoint itself.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 deepspeed==0.19.8 numpy==2.4.6
cat > "$work/convert.py" <<'PY'
import logging
import os
import sys

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

logging.disable(logging.WARNING)
deepspeed.init_distributed("gloo")

def converted(stage, accumulate_in):
    model = torch.nn.Linear(4, 4)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        **({"data_types": {"grad_accum_dtype": accumulate_in}} if accumulate_in else {}),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    engine.backward(engine(torch.ones(1, 4, dtype=torch.bfloat16)).float().mean())
    engine.step()
    folder = f"{sys.argv[1]}/stage{stage}-{accumulate_in}"
    engine.save_checkpoint(folder)
    assert os.path.exists(f"{folder}/zero_to_fp32.py")
    try:
        result = sorted(get_fp32_state_dict_from_zero_checkpoint(folder))
    except ValueError as error:
        result = "refused: " + str(error).rpartition("/")[2]
    print(f"stage {stage}, accumulation in {accumulate_in}: {type(engine.optimizer).__name__}, {result}", flush=True)
    return result

assert converted(1, None) == converted(2, "fp32") == ["bias", "weight"]
assert "is not a zero checkpoint" in converted(1, "fp32"), "these checkpoints can be converted now"
PY
TORCH_EXTENSIONS_DIR="$work/extensions" RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29532 DS_ACCELERATOR=cpu GLOO_SOCKET_IFNAME=lo \
  "$work/venv/bin/python" "$work/convert.py" "$work"
