#!/bin/bash
# On CPUs the bfloat16 gradient of an embedding row that was looked up 3,000 times counts 256 of them.
#
# Versions: torch 2.13.0 (CPU).
# Expected: sums of bfloat16 are made in fp32 and rounded once, as sum(), matrix products and the gradients of index_select and gather do it.
#   The choice among ways to look up rows is one of taste.
# What happens: the gradients of nn.Embedding, F.embedding_bag and weight[ids] add up occurrence after occurrence in bfloat16, which stops
#   at 256 times the addend. segment_reduce adds in the same way, so that its mean of ones is not 1.
# Seen (3,000 gradients of 1 for one row; the exact sum in bfloat16 is 3008):
#   nn.Embedding 256, weight[ids] 256, embedding_bag 256, index_select 3008, gather 3008, one-hot product 3008
#   segment_reduce of 3,000 ones: sum 256, mean 0.085; sum() 3008, mean() 1
#   2 rows, 4,096 gradients around 0.01: fp32 20.8 and 20.0, bfloat16 about 9 for both
# Why it matters: small tables have few, often used rows: document positions, levels of noise, languages, sentence types, padding. In a model in
#   bfloat16 (DeepSpeed's bf16, not autocast) they learn too slowly, and more so the larger the batch is. Adam hides a constant factor,
#   but not that late occurrences in the batch are lost.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import torch
from torch.nn import functional as F

count, width = 3000, 64
ids = torch.zeros(count, dtype=torch.int64)
lookups = {
    "nn.Embedding": lambda weight: F.embedding(ids, weight),
    "weight[ids]": lambda weight: weight[ids],
    "embedding_bag": lambda weight: F.embedding_bag(ids[:, None], weight, mode="sum"),
    "index_select": lambda weight: weight.index_select(0, ids),
    "gather": lambda weight: weight.gather(0, ids[:, None].expand(count, width)),
    "one-hot product": lambda weight: F.one_hot(ids, 4).to(weight.dtype) @ weight,
}
found = {}
for name, look_up in lookups.items():
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.ones(4, width, dtype=dtype, requires_grad=True)
        look_up(weight).sum().backward()
        (value,) = weight.grad[0].unique().tolist()
        found[name, dtype] = value
print("gradients in bfloat16:", {name: value for (name, dtype), value in found.items() if dtype == torch.bfloat16})
assert all(value == count for (_, dtype), value in found.items() if dtype == torch.float32)
for name in lookups:
    stalls = name in ("nn.Embedding", "weight[ids]", "embedding_bag")
    assert found[name, torch.bfloat16] == (256 if stalls else 3008), f"{name} adds otherwise now"

ones = torch.ones(count, dtype=torch.bfloat16)
reduced = {how: torch.segment_reduce(ones, how, lengths=torch.tensor([count])).item() for how in ("sum", "mean")}
print("segment_reduce of ones:", reduced, "sum()", ones.sum().item(), "mean()", ones.mean().item())
assert reduced["sum"] == 256 and reduced["mean"] < 0.1 and ones.mean() == 1, "segment_reduce adds otherwise now"

torch.manual_seed(0)
gradients, rows = 0.01 + 0.01 * torch.randn(4096, width), torch.randint(0, 2, (4096,))
sums = {}
for dtype in (torch.float32, torch.bfloat16):
    table = torch.nn.Embedding(2, width, dtype=dtype)
    (table(rows) * gradients.to(dtype)).sum().backward()
    sums[dtype] = table.weight.grad.float().mean(dim=1)
    print(f"2 rows, {dtype}:", [round(value, 1) for value in sums[dtype].tolist()])
assert bool((sums[torch.bfloat16] < 0.6 * sums[torch.float32]).all())
PY
