"""Count the kernels that a training step asks of a device. Counts, not times: any machine gives the same.

    python benchmarks/count_kernels.py [--layers 32]

Eager kernels are PyTorch's operations that are no views, forward and backward, on tensors without data, with norm and
attention as the one kernel that they are on CUDA; compiled ones are those that Inductor generates for a layer, for this
machine's CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lcm_ds.model import modeling
from lcm_ds.model.attention import SegmentLayout
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.modeling import BaseLCM

ROWS, LENGTH = 2, 32


def stand_in(name: str) -> Callable[..., torch.Tensor]:
    """An operation that stands for one kernel: its output is like its first input, its gradients like all inputs."""

    @torch.library.custom_op(f"count_kernels::{name}", mutates_args=())
    def forward(inputs: list[torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError

    @torch.library.custom_op(f"count_kernels::{name}_backward", mutates_args=())
    def backward(gradient: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        raise NotImplementedError

    forward.register_fake(lambda inputs: torch.empty_like(inputs[0]))
    backward.register_fake(lambda gradient, inputs: [torch.empty_like(tensor) for tensor in inputs])
    forward.register_autograd(
        lambda ctx, gradient: backward(gradient, list(ctx.saved_tensors)),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[0]),
    )
    return lambda *inputs: forward(list(inputs))


ATTENTION, NORM, ROPE, DROPOUT, SWIGLU = map(stand_in, ("attention", "norm", "rope", "dropout", "swiglu"))


class Kernels(TorchDispatchMode):
    """Counts operations that write memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        views = any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)
        self.count += not views and func not in (torch.ops.aten.detach.default, torch.ops.aten.empty.memory_format)
        return func(*args, **(kwargs or {}))


def model_of(layers: int, device: str, dropout: float) -> BaseLCM:
    """A small Base-LCM in training."""
    config = BaseLCMConfig(
        embed_dim=16,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=96,
        dropout=dropout,
    )
    with torch.device(device):
        return BaseLCM(config).to(torch.bfloat16).train()


def step(model: BaseLCM) -> None:
    """Forward and backward of a batch of two segments a row."""
    device = next(model.parameters()).device
    ids = (torch.arange(LENGTH) >= LENGTH // 3).int().repeat(ROWS, 1)
    concepts = torch.zeros(ROWS, LENGTH, 16, device=device)
    keys = torch.arange(ROWS, device=device)
    model(concepts, SegmentLayout.from_ids(ids, LENGTH), None, keys).float().square().mean().backward()


def eager_kernels(layers: int, dropout: float = 0.1, fused: bool = False) -> int:
    """Kernels of an eager forward and backward; fused: of a run on a GPU, whose `fused` functions are a kernel each."""
    model = model_of(layers, "meta", dropout)
    as_on_cuda = {
        "scaled_dot_product_attention": lambda query, key, value, **_: ATTENTION(query, key, value),
        "rms_norm": lambda x, shape, weight, eps: NORM(x, weight),
    }
    as_fused = {
        "rotate": lambda query, key, rope: (ROPE(query, key), key),
        "add_dropped": lambda residual, x, draw: DROPOUT(residual, x),
        "swiglu": SWIGLU,
    }
    with ExitStack() as stack:
        stack.enter_context(patch.multiple(torch.nn.functional, **as_on_cuda))
        if fused:
            stack.enter_context(patch.multiple(modeling, **as_fused))
        kernels = stack.enter_context(Kernels())
        step(model)
    return kernels.count


def compiled_kernels() -> int:
    """Kernels that Inductor generates for a layer, forward and backward; products and attention are not among them."""
    from torch._inductor import metrics

    torch._dynamo.reset()
    model = model_of(1, "cpu", 0.1)
    model.layers[0].compile()
    metrics.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        step(model)
    return metrics.generated_kernel_count


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    layers = parser.parse_args().layers
    total, without = eager_kernels(layers), eager_kernels(layers, dropout=0.0)
    print(f"eager, {layers} layers: {total} kernels a micro-batch, {total - without} of them for dropout")
    print(f"eager: {(total - eager_kernels(1)) / (layers - 1):.0f} kernels a layer")
    print(f"compiled layer: {compiled_kernels()} generated kernels")
    total, one = eager_kernels(layers, fused=True), eager_kernels(1, fused=True)
    print(f"eager on a GPU: {total} kernels a micro-batch, {(total - one) / (layers - 1):.0f} a layer")


if __name__ == "__main__":
    main()
