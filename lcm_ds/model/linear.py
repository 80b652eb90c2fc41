"""Linear layers that read the same input as one matrix product, each with its own parameters.

If the layers' weights are adjacent in memory, as with ZeRO 1 and 2, they are used in place as one matrix; otherwise
they are concatenated; in bf16 on a CPU, where reading the input again costs less than joining gradients, each layer is
a product. In fp32 on a CPU the products are oneDNN's or PyTorch's (MKL), of which either may be twice as fast: see
kernels.py. Layers with fp8 products (float8.py) compute these themselves in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 256  # inputs; below that, products that need no gradient are not joined
# A plain product of oneDNN's on tensors as they are; not in every build of PyTorch.
_onednn: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
PIECES = ("outputs", "gradients of inputs", "gradients of weights")
WAYS = ("onednn", "torch")  # for a piece, in fp32 on a CPU
_way = dict.fromkeys(PIECES, WAYS[0])


def use(ways: Mapping[str, str]) -> None:
    """Compute the products in fp32 on a CPU in these ways from now on: piece → way, for all pieces."""
    _way.update(ways)


def project(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """The outputs [..., out_features] of layers, all with a bias, for x [..., in_features].

    One product for all of them. One each in generation, whose few inputs are not worth concatenating weights; under
    ZeRO-3, which gathers a layer's parameters when the layer is called; in fp8; and in bf16 on a CPU.
    """
    if len(layers) > 1 and x.numel() < FEW * x.shape[-1] and not torch.is_grad_enabled():
        return tuple(project(x, layer)[0] for layer in layers)
    in_fp8 = layers[0].training and type(layers[0]) is not nn.Linear
    if in_fp8 or any(hasattr(layer.weight, "ds_id") for layer in layers):
        return tuple(layer(x) for layer in layers)
    if not by_onednn(x) and (len(layers) == 1 or x.device.type == "cpu"):
        return tuple(F.linear(x, layer.weight, layer.bias) for layer in layers)
    weights = [layer.weight for layer in layers]
    y: Tensor = torch.ops.lcm_ds.linear(x, weights, [layer.bias for layer in layers])
    return y.split([layer.out_features for layer in layers], dim=-1)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors concatenated along their first dimension; no copy if they are adjacent in memory."""
    first, end = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or not tensor.is_contiguous():
            return torch.cat(list(tensors))
        end += tensor.nbytes
    rows = sum(len(tensor) for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _linear(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    return product(x, joined(weights), joined(biases))


def _shape_of_linear(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(len(weight) for weight in weights))


def _linear_backward(
    gradient: Tensor, x: Tensor, weights: list[Tensor], needs_input: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (empty if it needs none), of all weights and of all biases."""
    flat = gradient.flatten(0, -2)
    of_x = x.new_empty(0)
    if needs_input:
        of_x = product(flat, joined(weights).t(), way=_way["gradients of inputs"]).view(x.shape)
    return of_x, product(flat.t(), x.flatten(0, -2).t(), way=_way["gradients of weights"]), flat.sum(0)


def _shapes_of_linear_backward(
    gradient: Tensor, x: Tensor, weights: list[Tensor], needs_input: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = gradient.shape[-1]
    of_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_input else x.new_empty(0)
    return of_x, x.new_empty(rows, x.shape[-1]), x.new_empty(rows)


def _keep(ctx: Any, inputs: tuple[Tensor, list[Tensor], list[Tensor]], output: Tensor) -> None:
    x, weights, _ = inputs
    # The parameters themselves, which exist anyway, not their concatenation.
    ctx.save_for_backward(x, *weights)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    x, *weights = ctx.saved_tensors
    needs_input = ctx.needs_input_grad[0]
    of_x, of_weights, of_biases = torch.ops.lcm_ds.linear_backward(gradient, x, weights, needs_input)
    rows = [len(weight) for weight in weights]
    return of_x if needs_input else None, list(of_weights.split(rows)), list(of_biases.split(rows))


def _no_second_derivatives(ctx: Any, *gradients: Tensor) -> NoReturn:
    raise NotImplementedError("second derivatives of linear layers in fp32 on a CPU")


# Defined by their schemas: torch.library.custom_op would import torch's compiler at the first call.
_TAG = torch.Tag.pt2_compliant_tag  # as custom_op's
torch.library.define("lcm_ds::linear", "(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor", tags=_TAG)
torch.library.impl("lcm_ds::linear", "default", _linear)
torch.library.register_fake("lcm_ds::linear", _shape_of_linear)
torch.library.register_autograd("lcm_ds::linear", _gradients, setup_context=_keep)
torch.library.define(
    "lcm_ds::linear_backward",
    "(Tensor gradient, Tensor x, Tensor[] weights, bool needs_input) -> (Tensor, Tensor, Tensor)",
    tags=_TAG,
)
torch.library.impl("lcm_ds::linear_backward", "default", _linear_backward)
torch.library.register_fake("lcm_ds::linear_backward", _shapes_of_linear_backward)
torch.library.register_autograd("lcm_ds::linear_backward", _no_second_derivatives)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, way: str | None = None) -> Tensor:
    """x times the transpose of weight, plus bias.

    Args:
        x: [..., in_features].
        weight: [out_features, in_features].
        bias: [out_features].
        way: One of `WAYS`, for fp32 on a CPU; None: that of outputs.

    Returns:
        [..., out_features].
    """
    if (way or _way["outputs"]) == "onednn" and by_onednn(x):
        y: Tensor = _onednn(x, weight, bias, "none", [], "")
        return y
    return F.linear(x, weight, bias)


def by_onednn(x: Tensor) -> bool:
    """Whether oneDNN's product can be called for x; PyTorch itself calls it for bf16."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and _onednn is not None
