"""The sizes of a Base-LCM: presets, what a train config makes of them, and the parameters that they mean.

Nothing here imports torch or transformers, so that a run can be planned and checked within a second.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Protocol

from lcm_ds.config import ModelConfig
from lcm_ds.errors import InputError, did_you_mean


class Sizes(Protocol):
    """What arithmetic on a model needs of it; `ModelSizes` and `BaseLCMConfig` have it."""

    embed_dim: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    dropout: float
    initializer_range: float
    attention: str

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""

    def sizes(self) -> dict[str, Any]:
        """What makes this model and no other, by the names of Hugging Face configs."""


@dataclass
class ModelSizes:
    """The sizes of a Base-LCM with the defaults of `BaseLCMConfig` (model/config.py), which explains them."""

    embed_dim: int = 1024
    hidden_size: int = 2048
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    intermediate_size: int = 5632
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    dropout: float = 0.0
    initializer_range: float = 0.02
    attention: str = "document"

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def sizes(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


SIZES = tuple(ModelSizes.__dataclass_fields__)
FP8_MULTIPLE = 16  # divides every dimension of a product in fp8, by the hardware

PRESETS: dict[str, dict[str, Any]] = {
    # MiniLM's 384 dimensions. On as little text as the quickstart has, width helps and depth only overfits.
    "quickstart": {
        "embed_dim": 384,
        "hidden_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "intermediate_size": 1024,
        "dropout": 0.2,
    },
    # The sizes of BaseLCM's example (github.com/dame-cell/BaseLCM, README): 12 layers, 8 heads; the rest its defaults.
    "mini": {
        "embed_dim": 1024,
        "hidden_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "dropout": 0.1,
    },
    "150m": {
        "embed_dim": 1024,
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "intermediate_size": 2816,
    },
    "400m": {
        "embed_dim": 1024,
        "hidden_size": 1536,
        "num_hidden_layers": 14,
        "num_attention_heads": 12,
        "intermediate_size": 4096,
    },
    # the paper's (arXiv 2412.08821, section 2.4.1); 5632 is 8192 · 2/3 up to a multiple of 256
    "1.6b": {
        "embed_dim": 1024,
        "hidden_size": 2048,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "intermediate_size": 5632,
        "dropout": 0.1,
    },
    # LLaMA-7B's width, depth and heads (arXiv 2302.13971, table 2): the paper has no Base-LCM of that size.
    "7b": {
        "embed_dim": 1024,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "dropout": 0.1,
    },
}


# Keys that may differ from those of the pretrained model.
OVERRIDABLE_KEYS = ("dropout", "initializer_range", "attention")


def resolve_sizes(model: ModelConfig, origin: str = "model", pretrained: Sizes | None = None) -> ModelSizes:
    """The sizes of a preset or of a pretrained model, updated with the config's own keys.

    Args:
        model: The block `model`.
        origin: The prefix of messages.
        pretrained: The model whose weights are taken.

    Returns:
        The model's sizes.

    Raises:
        InputError: An unknown preset, sizes that do not fit together, or each that differs from the pretrained model's.
    """
    sizes: dict[str, Any] = {}
    if model.preset is not None:
        if model.preset not in PRESETS:
            raise InputError(f"{origin}: model.preset: no preset {model.preset!r}{did_you_mean(model.preset, PRESETS)}")
        sizes.update(PRESETS[model.preset])
    sizes.update(model.model_dump(exclude={"preset", "init_from"}, exclude_none=True))
    if pretrained is not None:
        its = pretrained.sizes()
        conflicts = [name for name, value in sizes.items() if name not in OVERRIDABLE_KEYS and value != its[name]]
        if conflicts:
            raise InputError(
                f"{origin}: model.{name}: is {sizes[name]}, and {its[name]} in {model.init_from}, whose weights are "
                "taken; leave it out"
                for name in conflicts
            )
        sizes = {**its, **sizes}
    missing = [name for name in SIZES[:5] if name not in sizes]
    if missing:
        raise InputError(f"{origin}: model: without a preset it needs {', '.join(missing)}")
    resolved = ModelSizes(**sizes)
    if resolved.hidden_size % (2 * resolved.num_attention_heads):
        raise InputError(
            f"{origin}: model.hidden_size: {resolved.hidden_size} is not an even multiple of "
            f"num_attention_heads {resolved.num_attention_heads} (RoPE turns pairs of a head's dimensions)"
        )
    return resolved


def parameter_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The shape of each trainable parameter, by the names and in the order of `BaseLCM.named_parameters`."""
    width, inner, dims = sizes.hidden_size, sizes.intermediate_size, sizes.embed_dim
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    linear("pre_net", dims, width)
    for layer in range(sizes.num_hidden_layers):
        name = f"layers.{layer}"
        shapes[f"{name}.input_layernorm.weight"] = (width,)
        for projection in "qkvo":
            linear(f"{name}.self_attn.{projection}_proj", width, width)
        shapes[f"{name}.post_attention_layernorm.weight"] = (width,)
        linear(f"{name}.mlp.gate_proj", width, inner)
        linear(f"{name}.mlp.up_proj", width, inner)
        linear(f"{name}.mlp.down_proj", inner, width)
    shapes["norm.weight"] = (width,)
    linear("post_net", width, dims)
    return shapes


def count_parameters(sizes: Sizes) -> int:
    """The number of trainable parameters."""
    return sum(map(prod, parameter_shapes(sizes).values()))


def largest_parameter(sizes: Sizes) -> int:
    """The number of values of the largest one."""
    return max(map(prod, parameter_shapes(sizes).values()))
