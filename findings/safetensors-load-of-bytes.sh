#!/bin/bash
# safetensors' load() does not know types that save() writes and load_file() reads: float4 and e8m0 in PyTorch, bfloat16 in NumPy.
#
# Versions: safetensors 0.8.0, torch 2.13.0, numpy 2.4.6, ml_dtypes 0.6.0.
# Expected: load(data) is load_file(path) for bytes: whatever one of them reads, so does the other, and load(save(tensors)) is the way to send
#   tensors over a socket.
# What happens: files go through the Rust reader. Bytes go through a table of names in each Python module, which has fewer rows, and
#   a missing one is a bare KeyError. (Upstream for PyTorch: safetensors issue 839, open.)
# Seen:
#   torch float8_e8m0fnu:     load_file ok, load KeyError 'F8_E8M0'
#   torch float4_e2m1fn_x2:   load_file ok, load KeyError 'F4'
#   numpy bfloat16:           load_file ok, load KeyError 'BF16'
#   torch bfloat16, numpy float16: both ok
#   (numpy float8_e4m3fn can be saved, but neither of NumPy's two functions reads it.)
# Why it matters: the scales and weights of MX formats, and bfloat16 models read without PyTorch, work in every test with files and fail in
#   the service that gets them as bytes, or reads them from object storage.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 safetensors==0.8.0 numpy==2.4.6 ml_dtypes==0.6.0
"$work/venv/bin/python" - "$work" <<'PY'
import sys

import ml_dtypes
import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

path = f"{sys.argv[1]}/tensors.safetensors"
raw = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)

def outcome(module, tensor):
    module.save_file({"x": tensor}, path)
    file = module.load_file(path)["x"]
    assert file.dtype == tensor.dtype and file.shape == tensor.shape
    try:
        module.load(module.save({"x": tensor}))
    except KeyError as error:
        return f"KeyError {error}"
    return "ok"

cases = {
    "torch float8_e8m0fnu": (safetensors.torch, raw.view(torch.float8_e8m0fnu), "KeyError 'F8_E8M0'"),
    "torch float4_e2m1fn_x2": (safetensors.torch, raw.view(torch.float4_e2m1fn_x2), "KeyError 'F4'"),
    "torch bfloat16": (safetensors.torch, torch.ones(4, dtype=torch.bfloat16), "ok"),
    "numpy bfloat16": (safetensors.numpy, np.ones(4, ml_dtypes.bfloat16), "KeyError 'BF16'"),
    "numpy float16": (safetensors.numpy, np.ones(4, np.float16), "ok"),
}
for name, (module, tensor, expected) in cases.items():
    got = outcome(module, tensor)
    print(f"{name + ':':25} load_file ok, load {got}")
    assert got == expected, "load() and load_file() know other types now"
PY
