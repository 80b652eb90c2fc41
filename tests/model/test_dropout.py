"""Dropout is a function of a row's key: the same alone and in any batch, and otherwise as good as chance."""

import pytest
import torch
from tolerance import rounding_of

from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.dropout import Draw, drop
from lcm_ds.model.modeling import BaseLCM


def test_a_share_is_dropped_and_the_rest_makes_up_for_it():
    x = torch.ones(8, 64, 128)
    out = drop(x, Draw.of(torch.arange(8), 64, 128, 0.2).at(3))
    assert set(out.unique().tolist()) == {0.0, 1.25}
    assert (out == 0).float().mean().item() == pytest.approx(0.2, abs=0.005)
    # No row, position or dimension is spared or preferred.
    for over in ((1, 2), (0, 2), (0, 1)):
        shares = (out == 0).float().mean(dim=over)
        assert (shares - 0.2).abs().max() < 6 * (0.16 / (out.numel() / len(shares))) ** 0.5


def test_rows_and_sites_drop_independently():
    x = torch.ones(2, 128, 128)
    one = drop(x, Draw.of(torch.tensor([5, 6]), 128, 128, 0.5).at(0)) == 0
    other = drop(x, Draw.of(torch.tensor([5, 6]), 128, 128, 0.5).at(1)) == 0
    for a, b in ((one[0], one[1]), (one[0], other[0]), (one[1], other[0])):
        assert (a == b).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_a_row_loses_the_same_in_any_batch():
    torch.manual_seed(0)
    config = BaseLCMConfig(
        embed_dim=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, dropout=0.3
    )
    model = BaseLCM(config).initialize(1).train()
    concepts, keys = torch.randn(4, 6, 8), torch.tensor([11, 22, 33, 44])
    together = model(concepts, dropout_keys=keys)
    alone = torch.cat([model(concepts[i : i + 1], dropout_keys=keys[i : i + 1]) for i in range(4)])
    assert torch.allclose(together, alone, atol=rounding_of(config, 6))
    assert not torch.allclose(together, model(concepts, dropout_keys=keys + 1), atol=1e-4)
    with pytest.raises(ValueError, match="dropout_keys"):
        model(concepts)
    assert torch.equal(model.eval()(concepts), model(concepts, dropout_keys=keys))
