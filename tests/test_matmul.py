"""Products by oneDNN are those of torch, in fp32."""

import pytest
import torch

from lcm_ds import matmul
from lcm_ds.matmul import FEWER_BITS, LARGE, products


@pytest.mark.parametrize(
    ("n", "m", "k"), [(512, 1024, 384), (300, 51, 384), (3, 5, 7), (1, 1, 1), (0, 4, 3), (4, 0, 3)]
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_are_those_of_fp64_to_the_rounding_of_fp32(n, m, k, with_bias):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(n, k, generator=generator), torch.randn(m, k, generator=generator)
    bias = torch.randn(m, generator=generator) if with_bias else None
    exact = left.double() @ right.double().T + (0.0 if bias is None else bias.double())
    bound = k * 2.0**-24 * left.norm(dim=1).unsqueeze(1) * right.norm(dim=1) + 1e-6
    assert ((products(left, right, bias).double() - exact).abs() <= bound).all()
    # Of vectors that are not contiguous, as well.
    assert ((products(left.T.contiguous().T, right, bias).double() - exact).abs() <= bound).all()


def test_torch_has_the_product_of_onednn_and_the_fallback_is_the_same(monkeypatch):
    """A torch without it is only slower: this test reports it."""
    assert matmul._has_onednn()
    left, right, bias = torch.randn(300, 640), torch.randn(200, 640), torch.randn(200)
    assert len(left) * right.numel() >= LARGE
    by_onednn = products(left, right, bias)
    monkeypatch.setenv(FEWER_BITS[0], "BF16")
    assert not matmul._has_onednn()
    assert torch.allclose(products(left, right, bias), by_onednn, atol=1e-4)
    assert torch.allclose(products(left, right), by_onednn - bias, atol=1e-4)
