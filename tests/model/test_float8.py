"""Products of the decoder's layers in fp8: as exact as e4m3 allows, only in training, with the same parameters."""

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compilers import nop
from torch._functorch.partitioners import min_cut_rematerialization_partition

from lcm_ds.model.attention import Rope, SegmentLayout
from lcm_ds.model.float8 import device_without_float8, use_float8
from lcm_ds.model.linear import project

# e4m3 has three bits after the point: a number is rounded by at most 2⁻⁴ of itself. Below 2⁻⁶ its steps are 2⁻⁹. A
# scale, a power of two, brings the largest number of a row into (224, 448].
ROUNDING, SMALLEST = 2.0**-4, 2.0**-10 / 224
# The usual error of a product, relative to it: each of two factors is off by up to 2⁻⁴ of its leading bit, usually by
# 1 / √3 of that, and the leading bit is about 1 / √2 of a number.
USUAL = 2**0.5 * 2**-4 / 3**0.5 / 2**0.5
NO_GPU = pytest.mark.skipif(device_without_float8() is not None, reason="needs a GPU with products in fp8")
# CPUs compute products in fp8, too, by torch's reference kernel.
DEVICES = [("cpu", True), ("cpu", False), pytest.param("cuda", False, marks=[pytest.mark.gpu, NO_GPU])]
SIZES = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture
def make_fp8(make_model):
    """make_fp8(emulated) -> (a model in bf16, the same with fp8 products), both in training mode."""

    def make(emulated=True, **sizes):
        exact, rounded = (make_model(**SIZES, **sizes).bfloat16().train() for _ in range(2))
        use_float8(rounded, emulated)
        return exact, rounded

    return make


def rounded_by(x, dim):
    """The largest difference between x and its rounding to e4m3 with a scale for each row along dim."""
    largest = x.abs().amax(dim, keepdim=True)
    return torch.maximum(ROUNDING * x.abs(), SMALLEST * largest)


def product_and_bound(a, b):
    """a @ b in fp64, and the largest error of its rows and columns rounded to e4m3, its result to bf16."""
    a, b = a.double(), b.double()
    a_error, b_error = rounded_by(a, -1), rounded_by(b, 0)
    bound = a_error @ b.abs() + a.abs() @ b_error + a_error @ b_error
    exact = a @ b
    # Twice to bf16: torchao applies some scales after the product.
    return exact, bound + 2 * torch.finfo(torch.bfloat16).eps * (exact.abs() + bound)


@pytest.mark.parametrize(("device", "emulated"), DEVICES)
@pytest.mark.parametrize("size", [1.0, 1e-11], ids=["gradients of 1", "gradients of the loss's mean"])
def test_a_product_and_its_gradients_are_as_exact_as_e4m3_allows(make_fp8, device, emulated, size):
    """The mean over targets and dimensions makes gradients small: no loss scale is needed."""
    _, model = make_fp8(emulated)
    layer = model.to(device).layers[0].mlp.down_proj  # its bias is 0
    spread = torch.logspace(-3, 2, 48).bfloat16()[:, None]  # one scale for all rows would not fit
    x = (torch.randn(48, 96).bfloat16() * spread).to(device).requires_grad_()
    gradient = (torch.randn(48, 64).bfloat16() * spread * size).to(device)
    (y,) = project(x, layer)
    of_x, of_weight, of_bias = torch.autograd.grad(y, [x, layer.weight, layer.bias], gradient)
    x, weight = x.detach(), layer.weight.detach()
    for found, factors in ((y, (x, weight.t())), (of_x, (gradient, weight)), (of_weight, (gradient.t(), x))):
        exact, bound = product_and_bound(*factors)
        error = (found.detach() - exact).abs()
        assert bool((error <= bound).all())
        assert error.norm() / exact.norm() == pytest.approx(USUAL, rel=0.25)
    assert (of_bias - gradient.double().sum(0)).norm() < 2**-7 * gradient.double().norm()


@pytest.mark.parametrize("emulated", [True, False])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_so_and_is_found_by_what_skips_a_step(make_fp8, emulated, value):
    """torch casts infinity to 448 in e4m3. torchao scales a row with it by 448 / ∞ = 0, and 0 · ∞ is NaN."""
    _, model = make_fp8(emulated)
    layer = model.layers[0].mlp.down_proj
    x, gradient = torch.randn(16, 96).bfloat16(), torch.randn(16, 64).bfloat16()
    spoilt, of_spoilt = x.clone(), gradient.clone()
    spoilt[3, 5] = of_spoilt[3, 5] = value
    assert not project(spoilt, layer)[0][3].isfinite().any()
    (y,) = project(x.requires_grad_(), layer)
    for each in torch.autograd.grad(y, [x, layer.weight], of_spoilt):
        assert not each.isfinite().all()


def test_emulation_and_fp8_products_agree_to_the_rounding_of_their_results(make_fp8):
    concepts = torch.randn(2, 16, 12)
    (_, emulated), (_, real) = make_fp8(True), make_fp8(False)
    outputs = [model(concepts).double() for model in (emulated, real)]
    assert (outputs[0] - outputs[1]).norm() / outputs[0].norm() < 2**-7


def test_predictions_and_gradients_of_a_model_are_near_those_in_bf16(make_fp8):
    exact, rounded = make_fp8(initializer_range=0.1)
    concepts = torch.randn(4, 32, 12)
    results = []
    for model in (exact, rounded):
        y = model(concepts)
        y[:, :-1].float().sub(concepts[:, 1:]).square().mean().backward()
        results.append([y.flatten().double(), torch.cat([p.grad.flatten().double() for p in model.parameters()])])
    # Products behind each other, forward and backward, whose errors are independent.
    products = 2 * 4 * len(exact.layers)
    for bf16, fp8 in zip(*results, strict=True):
        assert 0.01 < (fp8 - bf16).norm() / bf16.norm() < USUAL * products**0.5


def test_only_the_layers_products_are_rounded_and_only_in_training(make_fp8):
    exact, rounded = make_fp8()
    concepts = torch.randn(2, 16, 12)
    assert not torch.equal(rounded(concepts), exact(concepts))
    assert torch.equal(rounded.eval()(concepts), exact.eval()(concepts))
    with torch.no_grad():  # the first pass of recomputation sees what the second one does
        assert torch.equal(rounded.train()(concepts), rounded(concepts))
        assert not torch.equal(rounded(concepts), exact(concepts))
    assert type(rounded.pre_net) is type(rounded.post_net) is nn.Linear


def test_parameters_keep_names_order_and_identity(make_model):
    model = make_model().bfloat16()
    before = list(model.named_parameters())
    use_float8(model, emulated=True)
    after = list(model.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(mine is theirs for (_, mine), (_, theirs) in zip(after, before, strict=True))
    assert set(model.state_dict()) == set(make_model().state_dict())


def test_a_compiled_layer_converts_each_input_once_for_each_of_its_two_scales(make_fp8):
    """Traced as for a GPU; the layers of a shared input are separate products with one conversion of it."""
    _, model = make_fp8(emulated=False)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return nop(graph, inputs)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    layer = torch.compile(model.layers[0], backend=backend, fullgraph=True)
    x = torch.randn(2, 16, 64, dtype=torch.bfloat16, requires_grad=True)
    layout = SegmentLayout.one_segment(2, 16, x.device).prepared(x.device, x.dtype, 16)
    rope = Rope.of(layout.positions, 16, 1e4)
    layer(x, rope, layout).sum().backward()
    forward, backward = graphs

    def count(graph, operator):
        return sum(node.target == operator for node in graph.graph.nodes)

    casts = sum(node.kwargs.get("dtype") == torch.float8_e4m3fn for graph in graphs for node in graph.graph.nodes)
    linears, inputs = 7, 4  # q, k and v share one, gate and up another
    assert count(forward, torch.ops.aten._scaled_mm.default) == linears
    assert count(backward, torch.ops.aten._scaled_mm.default) == 2 * linears
    assert casts == 2 * (linears + inputs + linears)  # weights, inputs, gradients of outputs


@pytest.mark.gpu
@NO_GPU
def test_a_compiled_model_on_a_gpu_is_near_emulation(make_fp8):
    (_, emulated), (_, real) = make_fp8(True), make_fp8(False)
    real.compile_layers()
    concepts = torch.randn(4, 32, 12, device="cuda")
    gradients = []
    for model in (emulated.to("cuda"), real.to("cuda")):
        model(concepts)[:, :-1].float().sub(concepts[:, 1:]).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten().double() for p in model.parameters()]))
    products = 2 * 4 * len(real.layers)
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < USUAL * products**0.5


class Gpu:
    def device_name(self):
        return "cuda"


@pytest.mark.parametrize(
    ("capabilities", "lacking"),
    [
        ([(9, 0), (9, 0)], None),
        ([(8, 9)], None),
        ([(10, 0)], None),
        ([(9, 0), (8, 0)], "GPU 1 (8.0)"),
        ([(8, 6)], "GPU 0 (8.6)"),
    ],
)
def test_gpus_have_fp8_products_from_ada_on(monkeypatch, capabilities, lacking):
    monkeypatch.setattr("lcm_ds.model.float8.get_accelerator", Gpu)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    assert device_without_float8() == lacking
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert device_without_float8() == "ROCm"


@pytest.mark.skipif(get_accelerator().device_name() != "cpu", reason="on a GPU its capability decides")
def test_cpus_have_none():
    assert device_without_float8() == "cpu"
