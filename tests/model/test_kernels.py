"""Every way in the table gives the same to rounding, and the one that is measured to be the fastest is used."""

import pytest
import torch
from tolerance import rounding_of

from lcm_ds.model import attention, kernels, linear
from lcm_ds.model.attention import SegmentLayout, attend
from lcm_ds.model.sizes import ModelSizes

OTHERS = [(piece, way) for piece, ways in kernels.WAYS.items() for way in ways[1:]]
DEFAULTS = {piece: ways[0] for piece, ways in kernels.WAYS.items()}
SIZES = ModelSizes(embed_dim=64, hidden_size=256, num_attention_heads=8, num_hidden_layers=1, intermediate_size=512)


@pytest.fixture(autouse=True)
def _no_choice_is_left():
    yield
    kernels.use({})


def results(model, layout, **ways):
    """Loss, predictions and gradients, computed in these ways."""
    kernels.use(ways)
    model.zero_grad()
    concepts = torch.randn(*layout.starts.shape, model.config.embed_dim, generator=torch.Generator().manual_seed(4))
    predictions = model(concepts, layout, dropout_keys=torch.arange(len(concepts)))
    loss = predictions.square().mean()
    loss.backward()
    return loss.item(), predictions.detach(), [parameter.grad.clone() for parameter in model.parameters()]


# rows of one segment, of parts that the mask is cut into, and neither; all see at most 4 · head_dim keys
@pytest.mark.parametrize("segments", [[24], [4, 8, 8, 1, 3], [20, 4]])
@pytest.mark.parametrize("over", ["document", "row"])
@pytest.mark.parametrize(("piece", "way"), OTHERS)
def test_a_way_agrees_with_the_first_in_losses_and_gradients(make_model, piece, way, over, segments):
    model = make_model(dropout=0.1, attention=over).train()
    ids = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(segments)).int().expand(3, -1)
    layout = SegmentLayout.from_ids(ids, max(segments), over)
    loss, predictions, gradients = results(model, layout, **{piece: way})
    expected = results(model, layout)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert torch.allclose(predictions, expected[1], atol=rounding_of(model.config, 24))
    for found, gradient in zip(gradients, expected[2], strict=True):
        assert (found - gradient).norm() <= 1e-4 * gradient.norm()


@pytest.mark.parametrize(("piece", "way"), OTHERS)
def test_a_chosen_way_is_the_one_that_computes(make_model, monkeypatch, piece, way):
    """The bits change, or with other libraries at least the calls do."""
    calls = []

    def product(x, weight, bias, *rest):
        calls.append(tuple(x.shape))
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(linear, "_onednn", product)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **more: calls.append("sdpa") or sdpa(*args, **more),
    )
    model = make_model(num_hidden_layers=1).train()
    layout = SegmentLayout.one_segment(2, 16, torch.device("cpu"))
    results(model, layout)
    every, calls[:] = list(calls), []
    results(model, layout, **{piece: way})
    assert 0 < len(calls) < len(every)
    assert ("sdpa" in calls) == (piece != "attention")
    assert kernels.in_use() == {piece: way}


@pytest.mark.parametrize("masked", [False, True])
def test_in_bf16_products_are_as_exact_as_sdpa_up_to_the_rounding_of_scores(masked):
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(64).div(20 if masked else 64, rounding_mode="floor").int().expand(4, -1)
    layout = SegmentLayout.from_ids(ids, 64)
    inputs = [torch.randn(4, 64, 4, 32, generator=generator, dtype=torch.float64) for _ in "qkvg"]

    def error(dtype, way):
        query, key, value, gradient = (tensor.to(dtype) for tensor in inputs)
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        prepared = layout.prepared(torch.device("cpu"), dtype, 32, way)
        out = attend(*leaves, prepared)
        return [tensor.double() for tensor in (out, *torch.autograd.grad(out, leaves, gradient))]

    exact = error(torch.float64, "sdpa")
    for sdpa, products, right in zip(
        error(torch.bfloat16, "sdpa"), error(torch.bfloat16, "products"), exact, strict=True
    ):
        assert (products - right).norm() < max(1.5 * (sdpa - right).norm(), 2**-7 * right.norm())


def test_products_are_not_used_for_many_keys_or_on_another_device():
    layout = SegmentLayout.one_segment(1, 4 * 16 + 1, torch.device("cpu"))
    fits = SegmentLayout.one_segment(1, 4 * 16, torch.device("cpu"))
    assert not layout.prepared(torch.device("cpu"), torch.float32, 16, "products").products
    assert fits.prepared(torch.device("cpu"), torch.float32, 16, "products").products
    assert not fits.prepared(torch.device("meta"), torch.float32, 16, "products").products


def clock(monkeypatch, seconds):
    """A clock that each call of a way moves by its seconds; those of first ways are 1."""
    now = [0.0]
    of_way = {
        "attention": lambda query, key, value, layout: "products" if layout.products else "sdpa",
        "product": lambda *factors, way: way,
    }

    def call(name):
        def compute(*args, **more):
            now[0] += seconds.get(of_way[name](*args, **more), 1.0)

        return compute

    monkeypatch.setattr(kernels, "_attend_and_back", call("attention"))
    monkeypatch.setattr(linear, "product", call("product"))
    monkeypatch.setattr(kernels.time, "thread_time", lambda: now[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fastest_is_chosen_if_it_is_faster_by_a_margin(monkeypatch, dtype):
    threads = torch.get_num_threads()
    clock(monkeypatch, {"products": 0.5, "torch": 0.9})
    chosen, reasons = kernels.measure(SIZES, 16, 128, 64, dtype, {})
    assert chosen == {**DEFAULTS, "attention": "products"}
    assert reasons == ["attention by products, 2.0 times as fast as sdpa"]
    clock(monkeypatch, {"products": 0.9, "torch": 0.25})
    chosen, reasons = kernels.measure(SIZES, 16, 128, 64, dtype, {})
    # PyTorch itself calls oneDNN for products in bf16
    products = dict.fromkeys(kernels.PRODUCTS, "torch" if dtype == torch.float32 else "onednn")
    assert chosen == {"attention": "sdpa", **products}
    assert len(reasons) == (3 if dtype == torch.float32 else 0)
    assert torch.get_num_threads() == threads


def test_gradients_of_weights_are_measured_with_more_concepts():
    """They are sums over the concepts, of which some ways are slow with many."""
    calls = kernels._calls(SIZES, 16, 128, 64, torch.float32)
    for way in linear.WAYS:
        x, _ = calls["outputs"][way].args
        gradient, of_x = calls["gradients of weights"][way].args
        assert len(x) == kernels.MEASURED < gradient.shape[1] == of_x.shape[1] == 16 * 128


def test_what_is_fixed_or_too_small_is_not_measured(monkeypatch):
    clock(monkeypatch, {"products": 0.5, "torch": 0.5})
    assert kernels.measure(SIZES, 1, 16, 16, torch.float32, {}) == (DEFAULTS, [])
    fixed = {"attention": "sdpa", "outputs": "onednn", "gradients of inputs": "torch"}
    chosen, reasons = kernels.measure(SIZES, 16, 128, 64, torch.float32, fixed)
    assert chosen == {**fixed, "gradients of weights": "torch"}
    assert reasons == [
        "gradients of inputs by torch, as configured",
        "gradients of weights by torch, 2.0 times as fast as onednn",
    ]


def test_measuring_computes_every_way_of_every_piece():
    calls = kernels._calls(SIZES, 16, 128, 64, torch.float32)
    assert {piece: tuple(ways) for piece, ways in calls.items()} == kernels.WAYS
    for ways in calls.values():
        found = [call() for call in ways.values()]
        for way in map(torch.utils._pytree.tree_leaves, found):
            for tensor, expected in zip(way, torch.utils._pytree.tree_leaves(found[0]), strict=True):
                assert torch.allclose(tensor, expected, atol=1e-3)


def test_the_table_names_the_ways_of_the_config():
    from typing import get_args

    from lcm_ds.config import KernelsConfig

    named = {name: get_args(field.annotation) for name, field in KernelsConfig.model_fields.items()}
    assert named == {"attention": ("measured", *attention.WAYS), "products": ("measured", *linear.WAYS)}
