#!/bin/bash
# OpenVINO computes NaN where scaled dot-product attention masks a whole row, for which PyTorch returns zeros.
#
# Versions: openvino 2026.4.1, torch 2.13.0 (CPU).
# Expected: a converted model returns what the model returns.
# What happens: a query that may attend to no key has zeros as its output in torch, whether the mask is boolean or holds -inf, and NaN after
#   conversion, without a warning. Other rows agree.
# Seen:
#   bool: torch 0.0, openvino nan; other rows differ by less than 1e-5: True
#   float32: torch 0.0, openvino nan; other rows differ by less than 1e-5: True
# Why it matters: in models with local attention (ModernBERT) a position far behind the end of a short text in a batch has no key in its
#   window. Pooling multiplies it by 0, and NaN times 0 is NaN: short texts lose their embedding as soon as a long one is in their batch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 torch==2.13.0 numpy
cd "$folder"
export HOME=$folder
cat > show.py <<'PYTHON'
import numpy
import openvino
import torch


class Attention(torch.nn.Module):
    def forward(self, x, mask):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)


torch.manual_seed(0)
x = torch.randn(1, 2, 4, 16)
allowed = torch.ones(1, 1, 4, 4, dtype=torch.bool)
allowed[..., 3, :] = False
for mask in (allowed, torch.zeros(1, 1, 4, 4).masked_fill(~allowed, float("-inf"))):
    expected = Attention()(x, mask).numpy()
    model = openvino.convert_model(Attention(), example_input=(x, mask))
    found = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x.numpy(), mask.numpy()])[0]
    close = bool(numpy.abs(found - expected)[:, :, :3].max() < 1e-5)
    print(f"{str(mask.dtype)[6:]}: torch {abs(expected[0, 0, 3, 0])}, openvino {abs(found[0, 0, 3, 0])}; "
          f"other rows differ by less than 1e-5: {close}")
PYTHON
venv/bin/python show.py 2>/dev/null | tee seen.txt
[ "$(grep -c 'torch 0.0, openvino nan; other rows differ by less than 1e-5: True' seen.txt)" -eq 2 ]
