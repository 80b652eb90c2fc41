"""A tiny model, and the golden file made with Meta's code."""

import pytest
import torch

from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.modeling import BaseLCM


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def make_model():
    """Tiny models in evaluation mode, with a normaliser that is not the identity; keywords are config fields."""

    def make(seed=0, **sizes):
        tiny = {
            "embed_dim": 12,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            # larger than in training, so that every path matters to the output
            "initializer_range": 0.3,
        }
        model = BaseLCM(BaseLCMConfig(**{**tiny, **sizes})).initialize(seed)
        generator = torch.Generator().manual_seed(99)
        dims = model.config.embed_dim
        center, scale = torch.randn(dims, generator=generator), torch.rand(dims, generator=generator) + 0.5
        model.normalizer.set(center.numpy(), scale.numpy())
        return model.eval()

    return make
