"""Matrix products without gradients, of an evaluation, and what this CPU multiplies natively.

On CPUs oneDNN computes them: torch sends those in bf16 there, but those in fp32 to MKL, whose kernels for AVX-512 are
for Intel's CPUs only. On AMD's they take 2.4 times as long.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Multiplications from which oneDNN is used: it generates code for every new shape, and wakes all threads for little.
LARGE = 2**22
# Sizes that vary from batch to batch are padded to multiples of it: code for a shape takes time, and stays in memory.
STEP = 128
# With these oneDNN may compute in fewer bits, whatever torch asks for.
FEWER_BITS = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")


def products(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """The dot products of vectors, in their dtype (fp32 or bf16) and without gradients.

    Args:
        left: [n, k].
        right: [m, k].
        bias: [m], which is added to each row.

    Returns:
        left · rightᵀ + bias, [n, m].
    """
    large = len(left) * right.numel() >= LARGE
    if large and left.dtype == torch.float32 and left.device.type == "cpu" and _has_onednn():
        padded = None if bias is None else pad(bias, 0)
        made: Tensor = torch.ops.mkldnn._linear_pointwise(pad(left, 0), pad(right, 0), padded, "none", [], "")
        return made[: len(left), : len(right)]
    return left @ right.T if bias is None else torch.addmm(bias, left, right.T)


def pad(vectors: Tensor, dim: int) -> Tensor:
    """Zeros at the end of a dimension, so that its size is a multiple of STEP."""
    missing = -vectors.shape[dim] % STEP
    if not missing:
        return vectors
    return F.pad(vectors, (0, 0) * (vectors.dim() - 1 - dim) + (0, missing))


def cpu_has_bf16() -> bool:
    """Whether this machine's CPU multiplies bf16 natively, not as fp32."""
    native: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(native.get("avx512_bf16") or native.get("amx_bf16"))


def full_precision() -> bool:
    """Whether products of fp32 have all bits of fp32: torch can be told to use TF32 or bf16."""
    return torch.get_float32_matmul_precision() == "highest"


def _has_onednn() -> bool:
    """Whether torch has the product of oneDNN that torch.compile uses, and in fp32."""
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return available and not any(os.environ.get(name) for name in FEWER_BITS)
