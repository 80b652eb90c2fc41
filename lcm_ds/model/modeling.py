"""Base-LCM: a decoder-only transformer from concepts to the next concept (arXiv 2412.08821, section 2.3.1).

Equal to Meta's base_lcm to rounding: biases on every linear, interleaved RoPE, RMSNorm, SwiGLU.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lcm_ds.model.attention import Cache, SegmentLayout, attend, attend_cached, rope_tables, rotate, uses_varlen
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.dropout import Draw, drop
from lcm_ds.model.normalizer import Normalizer

Rope = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), statistics in fp32, with a scale and without a bias."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[…, size] → the same shape and dtype."""
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Multi-head self-attention, causal inside segments."""

    def __init__(self, config: BaseLCMConfig, layer: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.layer, self.head_dim = layer, config.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x: Tensor, rope: Rope, layout: SegmentLayout, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """[rows, row_length, hidden_size] → the same."""
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, *rope), rotate(key, *rope)
        if cache is None:
            out = attend(query, key, value, layout, mask)
        else:
            out = attend_cached(query, key, value, self.layer, cache)
        return self.o_proj(out.flatten(-2))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: BaseLCMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, row_length, hidden_size] → the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each added to its input."""

    def __init__(self, config: BaseLCMConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.layer = layer

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        layout: SegmentLayout,
        mask: Tensor | None,
        draw: Draw | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """[rows, row_length, hidden_size] → the same."""
        attended = self.self_attn(self.input_layernorm(x), rope, layout, mask, cache)
        x = x + drop(attended, draw, 2 * self.layer)
        return x + drop(self.mlp(self.post_attention_layernorm(x)), draw, 2 * self.layer + 1)


class BaseLCM(PreTrainedModel):
    """Predicts from the concepts of a segment, up to each of them, the one that follows.

    The normaliser is part of the model, as buffers: `save_pretrained` and `from_pretrained` keep it.
    """

    config_class = BaseLCMConfig
    base_model_prefix = "base_lcm"
    main_input_name = "concepts"
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012 (Hugging Face's own declaration)
    _keep_in_fp32_modules_strict = ["normalizer"]  # noqa: RUF012

    def __init__(self, config: BaseLCMConfig) -> None:
        super().__init__(config)
        self.normalizer = Normalizer(config.embed_dim)
        self.pre_net = nn.Linear(config.embed_dim, config.hidden_size)
        layers = [DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)]
        self.layers: Sequence[DecoderLayer] = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_net = nn.Linear(config.hidden_size, config.embed_dim)
        # Calls a layer without keeping its activations (torch's or DeepSpeed's checkpointing); None keeps them.
        self.recompute: Callable[..., Tensor] | None = None
        self.post_init()

    def forward(
        self,
        concepts: Tensor,
        layout: SegmentLayout | None = None,
        noise: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Predictions in normalised space; entry t predicts concept t + 1.

        concepts: [rows, row_length, embed_dim], raw space, any floating dtype.
        layout: where the segments lie; None: every row is one segment.
        noise: the same shape, normalised space, added to the normalised inputs.
        dropout_keys: int64 [rows], what decides which values of a row are dropped; in training with dropout they are
        needed, elsewhere they do nothing.
        cache: what earlier calls saw of the same rows; it grows by these concepts. Goes without a layout.

        Returns [rows, row_length, embed_dim] in the parameters' dtype; `normalizer.denormalize` gives raw concepts.
        """
        inputs = self.normalizer.normalize(concepts)
        if noise is not None:
            inputs = inputs + noise
        hidden = self.pre_net(inputs.to(self.pre_net.weight.dtype))
        if layout is None:
            seen = 0 if cache is None else len(cache)
            layout = SegmentLayout.one_segment(concepts.shape[0], concepts.shape[1], concepts.device, seen)
        varlen = uses_varlen(hidden.device, hidden.dtype, self.config.head_dim)
        mask = None if cache is not None or varlen else layout.mask()
        rope = rope_tables(layout.positions, self.config.head_dim, self.config.rope_theta)
        draw = None
        if self.training and self.config.dropout > 0:
            if dropout_keys is None:
                raise ValueError("training with dropout needs dropout_keys, a number for each row")
            draw = Draw.of(dropout_keys, concepts.shape[1], self.config.hidden_size, self.config.dropout)
        for layer in self.layers:
            call = partial(layer, rope=rope, layout=layout, mask=mask, draw=draw, cache=cache)
            hidden = call(hidden) if self.recompute is None or not self.training else self.recompute(call, hidden)
        return self.post_net(self.norm(hidden))

    # --- initial weights ----------------------------------------------------------------------------------------------

    def _init_weights(self, module: nn.Module) -> None:
        """Hugging Face's hook: fresh weights for a model made without a seed."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self._std(module))
            nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def _std(self, linear: nn.Linear) -> float:
        """initializer_range, over √(2 · layers) for what is added to the residual stream (GPT-2) and for the output."""
        std: float = self.config.initializer_range
        ends = [layer.self_attn.o_proj for layer in self.layers] + [layer.mlp.down_proj for layer in self.layers]
        adds = any(linear is end for end in [self.post_net, *ends])
        return std / math.sqrt(2 * self.config.num_hidden_layers) if adds else std

    def initialization(self, seed: int) -> Iterator[tuple[list[nn.Parameter], Callable[[], None]]]:
        """Each module's own parameters and what fills them, for a caller who has to gather them first (ZeRO-3).

        The values depend on (seed, config) alone: not on dtype, device, world size or ZeRO stage.
        """
        for name, module in self.named_modules():
            # RMSNorm's scales are 1 as they are made.
            if isinstance(module, nn.Linear):
                yield list(module.parameters()), self._filler(seed, name, module)

    def initialize(self, seed: int) -> BaseLCM:
        """Fill all parameters from a seed; returns the model."""
        for _, fill in self.initialization(seed):
            fill()
        return self

    def _filler(self, seed: int, name: str, linear: nn.Linear) -> Callable[[], None]:
        def fill() -> None:
            digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            # Drawn in fp32 on the CPU and then rounded and moved, so that all devices and dtypes start from the same.
            weight = torch.empty(linear.weight.shape, dtype=torch.float32, device="cpu")
            weight.normal_(std=self._std(linear), generator=generator)
            with torch.no_grad():
                linear.weight.copy_(weight)
                linear.bias.zero_()

        return fill
