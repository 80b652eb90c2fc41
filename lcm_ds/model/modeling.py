"""Base-LCM: a decoder-only transformer from concepts to the next concept (arXiv 2412.08821, section 2.3.1).

Equal to Meta's base_lcm to rounding: biases on every linear, interleaved RoPE, RMSNorm, SwiGLU.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcm_ds.model.attention import Cache, Rope, SegmentLayout, attend, rotate
from lcm_ds.model.counter_rng import Draw, DropoutDraws, add_dropped
from lcm_ds.model.fused import fused, training_pass
from lcm_ds.model.linear import project
from lcm_ds.model.normalizer import Normalizer
from lcm_ds.model.recompute import recomputed_swiglu
from lcm_ds.model.sizes import Sizes

CHUNK = 2**22  # initial values that are drawn at a time
CACHED = 2**18  # values of a norm that are computed at a time on a CPU


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), statistics in fp32, with a scale and without a bias."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[…, size] → the same shape and dtype."""
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            out: Tensor = NormOnCPU.apply(x, self.weight, self.eps)
            return out
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class NormOnCPU(torch.autograd.Function):
    """RMSNorm part by part, of which only the input is kept: PyTorch's on CPUs keeps two fp32 tensors of its size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
        scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for part, factor, into in _in_parts(x, scale, out):
            torch.mul(part * factor, weight, out=into)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        factors, size = weight.to(scale.dtype), x.shape[-1]
        of_x, of_weight = torch.empty_like(x, memory_format=torch.contiguous_format), torch.zeros_like(factors)
        for part, factor, of_part, into in _in_parts(x, scale, gradient, of_x):
            normed = part * factor
            product = of_part * normed
            of_weight += product.sum(0)
            mean = torch.mv(product, factors).div_(-size).unsqueeze(1)
            torch.mul(torch.addcmul(of_part * factors, normed, mean), factor, out=into)
        return of_x, of_weight.to(weight.dtype), None


def _in_parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of tensors [..., size] along all but the last dimension, so small that they stay in a processor's cache."""
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    return zip(*(tensor.split(max(1, CACHED // tensors[0].shape[-1])) for tensor in flat), strict=True)


class Attention(nn.Module):
    """Multi-head self-attention, causal inside segments."""

    def __init__(self, config: Sizes, layer: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.layer, self.head_dim = layer, config.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x: Tensor, rope: Rope, layout: SegmentLayout, cache: Cache | None) -> Tensor:
        """[rows, row_length, hidden_size] → the same."""
        # Values are a product of their own: attention keeps them for backward, and with them all they are a part of.
        projected = (*project(x, self.q_proj, self.k_proj), *project(x, self.v_proj))
        query, key, value = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)
        query, key = rotate(query, key, rope)
        out = attend(query, key, value, layout) if cache is None else cache.attend(query, key, value, self.layer)
        return project(out.flatten(-2), self.o_proj)[0]


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    recompute = False  # SwiGLU, in the backward pass

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, row_length, hidden_size] → the same."""
        gate, up = project(x, self.gate_proj, self.up_proj)
        if self.recompute:
            return recomputed_swiglu(gate, up, lambda product: project(product, self.down_proj)[0])
        return project(swiglu(gate, up), self.down_proj)[0]


@fused
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, [rows, row_length, intermediate_size]."""
    return F.silu(gate) * up


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each added to its input."""

    def __init__(self, config: Sizes, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        layout: SegmentLayout,
        draws: tuple[Draw | None, Draw | None] = (None, None),
        cache: Cache | None = None,
    ) -> Tensor:
        """[rows, row_length, hidden_size] → the same; draws: for the dropout of each block's output."""
        x = add_dropped(x, self.self_attn(self.input_layernorm(x), rope, layout, cache), draws[0])
        return add_dropped(x, self.mlp(self.post_attention_layernorm(x)), draws[1])


class BaseLCM(nn.Module):
    """Predicts from the concepts of a segment, up to each of them, the one that follows.

    The normaliser is part of the model, as buffers. `lcm_ds.BaseLCM` is the same model with `from_pretrained` and
    `save_pretrained` (model/hugging_face.py).
    """

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        self.config = config
        self._build(config)
        self.apply(self._init_weights)

    def _build(self, config: Sizes) -> None:
        self.normalizer = Normalizer(config.embed_dim)
        self.pre_net = nn.Linear(config.embed_dim, config.hidden_size)
        layers = [DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)]
        self.layers: Sequence[DecoderLayer] = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_net = nn.Linear(config.hidden_size, config.embed_dim)
        # Calls a layer without keeping its activations (torch's or DeepSpeed's checkpointing); None keeps them.
        self.recompute: Callable[..., Tensor] | None = None
        self.recompute_every = 1  # with n, every n-th layer, from the first on

    def forward(
        self,
        concepts: Tensor,
        layout: SegmentLayout | None = None,
        noise: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Predictions in normalised space; entry t predicts concept t + 1.

        Args:
            concepts: [rows, row_length, embed_dim], raw space, any floating dtype.
            layout: Positions of the segments; None: every row is one segment.
            noise: The same shape, normalised space, added to the normalised inputs.
            dropout_keys: int64 [rows], which decide the values that are dropped; used only in training with dropout.
            cache: Past concepts of the same rows; it grows by these. Not with a layout.

        Returns:
            [rows, row_length, embed_dim] in the parameters' dtype; `normalizer.denormalize` gives raw concepts.
        """
        inputs = self.normalizer.normalize(concepts)
        if noise is not None:
            inputs = inputs + noise
        (hidden,) = project(inputs.to(self.pre_net.weight.dtype), self.pre_net)
        if cache is not None:
            layout = cache.layout(concepts.shape[0], concepts.shape[1], concepts.device)
        elif layout is None:
            layout = SegmentLayout.one_segment(concepts.shape[0], concepts.shape[1], concepts.device)
        layout = layout.prepared(hidden.device, hidden.dtype, self.config.head_dim)
        rope = Rope.of(layout.positions, self.config.head_dim, self.config.rope_theta)
        dropout = None
        if self.training and self.config.dropout > 0:
            if dropout_keys is None:
                raise ValueError("training with dropout needs dropout_keys, a number for each row")
            shape = concepts.shape[1], self.config.hidden_size
            dropout = DropoutDraws.of(dropout_keys, 2 * len(self.layers), *shape, self.config.dropout)
        recompute = self.recompute if self.training else None
        with training_pass(self.training):
            for i, layer in enumerate(self.layers):
                draws = (None, None) if dropout is None else (dropout.at(2 * i), dropout.at(2 * i + 1))
                call = partial(layer, rope=rope, layout=layout, draws=draws, cache=cache)
                hidden = call(hidden) if recompute is None or i % self.recompute_every else recompute(call, hidden)
        return project(self.norm(hidden), self.post_net)[0]

    def num_parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def compile_layers(self) -> None:
        """torch.compile for each layer, which share the compiled code. Not for ZeRO-3, whose hooks break the graph."""
        for layer in self.layers:
            layer.compile()

    # --- initial weights ----------------------------------------------------------------------------------------------

    def _init_weights(self, module: nn.Module) -> None:
        """Fresh weights for a model made without a seed, or for those that a folder lacks."""
        if isinstance(module, nn.Linear):
            if not module.weight.is_meta:  # it has no values; torch would import its compiler to find that out
                nn.init.normal_(module.weight, std=self._std(module))
            nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def _std(self, linear: nn.Linear) -> float:
        """initializer_range; over √(2 · layers) for layers that add to the residual stream (GPT-2) and the output."""
        std: float = self.config.initializer_range
        ends = [layer.self_attn.o_proj for layer in self.layers] + [layer.mlp.down_proj for layer in self.layers]
        adds = any(linear is end for end in [self.post_net, *ends])
        return std / math.sqrt(2 * self.config.num_hidden_layers) if adds else std

    def initialization(self, seed: int) -> Iterator[tuple[list[nn.Parameter], Callable[[], None]]]:
        """Each module's own parameters and a function that fills them: ZeRO-3 has to gather them first.

        The values depend only on (seed, config), not on dtype, device, world size or ZeRO stage.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                yield list(module.parameters()), self._filler(seed, name, module)
            elif isinstance(module, RMSNorm):
                yield [module.weight], partial(self._fill_with_ones, module.weight)

    def initialize(self, seed: int) -> BaseLCM:
        """Fill all parameters from a seed; returns the model."""
        for _, fill in self.initialization(seed):
            fill()
        return self

    @staticmethod
    def _fill_with_ones(weight: nn.Parameter) -> None:
        nn.init.ones_(weight)

    def _filler(self, seed: int, name: str, linear: nn.Linear) -> Callable[[], None]:
        def fill() -> None:
            digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            # Drawn in fp32 on the CPU and then rounded and moved, so that all devices and dtypes start from the same.
            with torch.no_grad():
                weight, first = linear.weight.view(-1), 0
                while first < len(weight):
                    # normal_ draws 16 values at a time: parts that are multiples of 16 get what the whole would get.
                    size = CHUNK if len(weight) - first >= CHUNK + 16 else len(weight) - first
                    part = torch.empty(size, dtype=torch.float32, device="cpu")
                    weight[first : first + size] = part.normal_(std=self._std(linear), generator=generator)
                    first += size
                linear.bias.zero_()

        return fill
