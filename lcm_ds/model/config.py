"""Sizes of a Base-LCM: its Hugging Face config, the presets, and what a train config makes of them."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from lcm_ds.config import ModelConfig
from lcm_ds.errors import InputError, did_you_mean


class BaseLCMConfig(PretrainedConfig):
    """A Base-LCM (arXiv 2412.08821, section 2.3.1); names as in Hugging Face configs.

    embed_dim: numbers in a concept; hidden_size: width of the decoder; dropout: on what each attention and
    feed-forward block adds to its input, in training only; attention: "document", a concept sees those before it in
    its segment, or "row", all before it in its row.
    """

    model_type = "base_lcm"

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
        """What makes this model and no other: the fields above."""
        return {name: getattr(self, name) for name in SIZES}


SIZES = (
    "embed_dim",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "rms_norm_eps",
    "rope_theta",
    "dropout",
    "initializer_range",
    "attention",
)

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


def resolve_model(model: ModelConfig, origin: str = "model", pretrained: BaseLCMConfig | None = None) -> BaseLCMConfig:
    """The sizes of a preset or of a pretrained model, updated with the config's own keys.

    Args:
        model: The block `model`.
        origin: The prefix of messages.
        pretrained: The config of the model whose weights are taken.

    Returns:
        The model's config.

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
    config = BaseLCMConfig(**sizes)
    if config.hidden_size % (2 * config.num_attention_heads):
        raise InputError(
            f"{origin}: model.hidden_size: {config.hidden_size} is not an even multiple of "
            f"num_attention_heads {config.num_attention_heads} (RoPE turns pairs of a head's dimensions)"
        )
    return config
