"""Random values are functions of a row's key: the same alone and in any batch, and otherwise as good as chance."""

import math

import pytest
import torch
from tolerance import rounding_of

from lcm_ds.model import fused
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.counter_rng import ALIGNMENT, DropoutDraws, drop, mix, normal
from lcm_ds.model.modeling import BaseLCM


def draw(keys, row_length, hidden_size, p, site):
    return DropoutDraws.of(torch.tensor(keys), site + 1, row_length, hidden_size, p).at(site)


def test_a_share_is_dropped_and_the_rest_makes_up_for_it():
    x = torch.ones(8, 64, 128)
    out = drop(x, draw(range(8), 64, 128, 0.2, site=3))
    assert set(out.unique().tolist()) == {0.0, 1.25}
    assert (out == 0).float().mean().item() == pytest.approx(0.2, abs=0.005)
    # No row, position or dimension is spared or preferred.
    for over in ((1, 2), (0, 2), (0, 1)):
        shares = (out == 0).float().mean(dim=over)
        assert (shares - 0.2).abs().max() < 6 * (0.16 / (out.numel() / len(shares))) ** 0.5


def test_rows_and_sites_drop_independently():
    x = torch.ones(2, 128, 128)
    one, other = (drop(x, draw([5, 6], 128, 128, 0.5, site)) == 0 for site in (0, 1))
    for a, b in ((one[0], one[1]), (one[0], other[0]), (one[1], other[0])):
        assert (a == b).float().mean().item() == pytest.approx(0.5, abs=0.02)


def murmur3(word):
    """The same finaliser on Python's numbers."""
    word = ((word ^ (word >> 16)) * 0x85EBCA6B) % 2**32
    word = ((word ^ (word >> 13)) * 0xC2B2AE35) % 2**32
    return word ^ (word >> 16)


def test_masks_are_those_of_unsigned_words_by_hand():
    key, site, p = 0x9E3779B97F4A7C15, 2, 0.3
    found = drop(torch.ones(1, 3, 5), draw([key - 2**64], 3, 5, p, site)).flatten() == 0
    of_site = murmur3(murmur3(key % 2**32) + site)
    assert found.tolist() == [murmur3(murmur3(i) ^ of_site) < p * 2**32 for i in range(15)]
    words = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31)], dtype=torch.int32)
    assert [int(word) % 2**32 for word in mix(words)] == [murmur3(int(word) % 2**32) for word in words]


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


def test_noise_is_standard_normal_and_independent():
    rows, length, dims = 8, 256, 64
    values = normal(torch.arange(rows) * 2**33 + 7, length, dims).double()
    n = values.numel()
    # The Kolmogorov-Smirnov distance to the normal distribution; more than this has a probability below 1e-6.
    cumulated = torch.special.ndtr(values.flatten().sort().values)
    steps = torch.arange(n, dtype=torch.float64) / n
    distance = torch.maximum((cumulated - steps).abs(), (cumulated - steps - 1 / n).abs()).max()
    assert distance < 2.7 / math.sqrt(n)
    # No correlation: of a value with the next dimension, position or row, nor of squares.
    for power in (1, 2):
        z = values**power
        z = (z - z.mean()) / z.std()
        for one, other in ((z[..., 1:], z[..., :-1]), (z[:, 1:], z[:, :-1]), (z[1:], z[:-1])):
            assert (one * other).mean().abs() < 5 / math.sqrt(one.numel())
    assert values.abs().max() < math.sqrt(2 * 32 * math.log(2))
    assert (values.mean(dim=(0, 1)).abs() < 5 / math.sqrt(rows * length)).all()


def test_noise_by_hand_and_in_longer_rows():
    key = 0x0123456789ABCDEF
    (found,) = normal(torch.tensor([key]), 3, 3)
    high = (key >> 32) ^ murmur3(key % 2**32)
    words = (key % 2**32) ^ murmur3(high), high
    by_hand = []
    for index in range(9):
        first, second = (murmur3(murmur3(index) ^ murmur3(word)) >> 1 for word in words)
        by_hand.append(math.sqrt(-2 * math.log((first + 0.5) / 2**31)) * math.cos(math.tau * second / 2**31))
    assert torch.allclose(found.flatten().double(), torch.tensor(by_hand, dtype=torch.float64), atol=1e-5)
    # A longer row has the same values first.
    assert torch.equal(normal(torch.tensor([key]), 5, 3)[0, :3], found)


def test_fused_functions_give_the_same(monkeypatch):
    keys, x = torch.tensor([3, -4, 5]), torch.randn(3, 8, 6)
    dropout = DropoutDraws.of(keys, 4, 8, 6, 0.4)
    expected = [*dropout[:2], drop(x, dropout.at(3)), normal(keys, 8, 6)]
    monkeypatch.setattr(fused, "_enabled", True)
    torch._dynamo.reset()
    dropout = DropoutDraws.of(keys, 4, 8, 6, 0.4)
    found = [*dropout[:2], drop(x, dropout.at(3)), normal(keys, 8, 6)]
    assert dropout.keys.stride(0) % ALIGNMENT == 0  # or compiled layers would copy the keys of each site
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    assert all(torch.equal(one, other) for one, other in zip(found[:3], expected[:3], strict=True))
    assert torch.allclose(found[3], expected[3], atol=1e-5)
