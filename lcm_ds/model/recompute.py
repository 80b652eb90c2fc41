"""SwiGLU that is computed again in the backward pass instead of being kept for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Size, Tensor
from torch.utils.checkpoint import checkpoint

# A kept tensor, or the function that computes it again, with its shape and strides.
Kept = Tensor | tuple[Callable[[], Tensor], Size, tuple[int, ...]]


def recomputed_swiglu(gate: Tensor, up: Tensor, use: Callable[[Tensor], Tensor]) -> Tensor:
    """use(silu(gate) · up), of which only gate and up are kept, and what `use` keeps apart from its argument.

    Values and gradients are those without it, for two more elementwise operations: bit for bit if SwiGLU is not
    compiled.

    Args:
        gate: [..., intermediate_size].
        up: the same.
        use: the layer that reads the product, with whatever kernel, parameters and hooks it has.

    Returns:
        What `use` returns.
    """
    if torch.compiler.is_compiling():
        return use(checkpoint(lambda gate, up: F.silu(gate) * up, gate, up, use_reentrant=False))
    again: dict[int, Callable[[], Tensor]] = {}  # by address

    def pack(tensor: Tensor) -> Kept:
        compute = again.get(tensor.data_ptr())
        return tensor if compute is None else (compute, tensor.shape, tensor.stride())

    def unpack(kept: Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        compute, shape, stride = kept
        return compute().as_strided(shape, stride)

    kept_gate, kept_up = gate.detach(), up.detach()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        activated = F.silu(gate)
        again[activated.data_ptr()] = lambda: F.silu(kept_gate)
        product = activated * up
        again[product.data_ptr()] = lambda: F.silu(kept_gate) * kept_up
        return use(product)
