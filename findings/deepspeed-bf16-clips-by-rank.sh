#!/bin/bash
# DeepSpeed's ZeRO-1 in bf16 does not clip parameters that a rank's own batch has not used: a step may be many times the limit.
#
# Versions: deepspeed 0.19.8, torch 2.13.0 (CPU, gloo, two ranks; DeepSpeed builds a kernel, so g++ is needed).
# Expected: gradients are summed over ranks before they are clipped, so that their norm is the same on all ranks, and a clipped gradient has
#   the norm gradient_clipping.
# What happens: with bf16, stage 1 and data_types.grad_accum_dtype fp32 (BF16_Optimizer), each rank leaves the parameters that had no gradient
#   in its own batch out of the norm and of the clipping, although after the sum they have the other rank's. get_global_grad_norm() differs
#   between ranks, each rank clips its partition by its own norm, and what it left out not at all. Stage 2 is right.
# Seen (two ranks, each of which uses one of two heads; SGD with learning rate 1, gradient_clipping 0.125):
#   ZeRO-1: norm on rank 0 8.49, on rank 1 11.64; the clipped step has norm 1.462 of 0.125
#   ZeRO-2: norm on rank 0 15.03, on rank 1 15.03; the clipped step has norm 0.125 of 0.125
# Why it matters: heads or adapters by language, modality or task get batches in which they are not used. Those steps are the ones that
#   clipping was meant for, and the logged norm is rank 0's.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 deepspeed==0.19.8 numpy==2.4.6
cat > "$work/clip.py" <<'PY'
import logging
import deepspeed
import torch

logging.disable(logging.WARNING)
deepspeed.init_distributed("gloo")
rank = torch.distributed.get_rank()

class TwoHeads(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = torch.nn.Linear(8, 8, bias=False)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(8, 8, bias=False) for _ in range(2))

    def forward(self, x, head):
        return self.heads[head](self.trunk(x))

def step(stage):
    torch.manual_seed(0)
    model = TwoHeads()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.125,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    before = {name: deepspeed.utils.safe_get_full_fp32_param(p).clone() for name, p in model.named_parameters()}
    loss = engine(torch.ones(1, 8, dtype=torch.bfloat16), head=rank).float().sum()
    engine.backward(loss * (1 + 3 * rank))
    engine.step()
    moved = {name: (deepspeed.utils.safe_get_full_fp32_param(p) - before[name]).norm() for name, p in model.named_parameters()}
    norms = [torch.zeros(1) for _ in range(2)]
    torch.distributed.all_gather(norms, torch.tensor([float(engine.get_global_grad_norm())]))
    return [round(norm.item(), 2) for norm in norms], torch.stack(list(moved.values())).norm().item()

found = {stage: step(stage) for stage in (1, 2)}
if rank == 0:
    for stage, (norms, moved) in found.items():
        print(f"ZeRO-{stage}: norm on rank 0 {norms[0]}, on rank 1 {norms[1]}; the clipped step has norm {moved:.3f} of 0.125")
    (one, other), moved = found[1]
    assert abs(one - other) > 1 and moved > 1, "ZeRO-1 clips what all ranks sum now"
    (one, other), moved = found[2]
    assert one == other and abs(moved - 0.125) < 0.002
PY
for rank in 0 1; do
  TORCH_EXTENSIONS_DIR="$work/extensions" RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29532 DS_ACCELERATOR=cpu \
    GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1 "$work/venv/bin/python" "$work/clip.py" > "$work/out-$rank" 2> "$work/err-$rank" &
  pids[rank]=$!
done
for rank in 0 1; do wait "${pids[rank]}" || { cat "$work/err-$rank"; exit 1; }; done
grep ZeRO- "$work/out-0"
