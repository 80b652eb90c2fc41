"""A Base-LCM's Hugging Face config; sizes.py has the presets and what a train config makes of them."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from lcm_ds.config import ModelConfig
from lcm_ds.model.sizes import PRESETS, SIZES, Sizes, resolve_sizes

__all__ = ["PRESETS", "BaseLCMConfig", "resolve_model"]


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


def resolve_model(model: ModelConfig, origin: str = "model", pretrained: Sizes | None = None) -> BaseLCMConfig:
    """`resolve_sizes` as a Hugging Face config."""
    return BaseLCMConfig(**resolve_sizes(model, origin, pretrained).sizes())
