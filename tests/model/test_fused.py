"""Functions between the products of a layer are one kernel each when they are compiled; counts need no GPU."""

import re

import pytest
import torch
from torch._inductor import metrics
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

from lcm_ds.model import fused
from lcm_ds.model.attention import Rope, rotate
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.counter_rng import DropoutDraws, add_dropped, normal
from lcm_ds.model.modeling import BaseLCM, swiglu

ROWS, LENGTH, HEADS, WIDTH = 2, 8, 2, 16


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float32).to(torch.bfloat16).requires_grad_()


@pytest.fixture
def fusion(monkeypatch):
    """Functions are compiled, and not taken from a cache."""
    monkeypatch.setattr(fused, "_enabled", True)
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False):
        yield
    torch._dynamo.reset()


def kernels(call):
    """How many kernels are generated for a call and its backward."""
    metrics.reset()
    outputs = [output for output in call() if output.requires_grad]
    forward = metrics.generated_kernel_count
    if outputs:
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    return forward, metrics.generated_kernel_count - forward


@pytest.mark.slow
def test_each_function_is_one_kernel_forward_and_one_backward(fusion):
    query, key = (leaf(ROWS, LENGTH, HEADS, WIDTH) for _ in range(2))
    rope = Rope.of(torch.arange(LENGTH).repeat(ROWS, 1), WIDTH, 1e4)
    assert kernels(lambda: rotate(query, key, rope)) == (1, 1)

    gate, up = (leaf(ROWS, LENGTH, WIDTH) for _ in range(2))
    assert kernels(lambda: [swiglu(gate, up)]) == (1, 1)

    keys = torch.tensor([4, 5])
    draw = DropoutDraws.of(keys, 3, LENGTH, WIDTH, 0.1).at(2)
    residual, x = (leaf(ROWS, LENGTH, WIDTH) for _ in range(2))
    assert kernels(lambda: [add_dropped(residual, x, draw)]) == (1, 1)
    assert kernels(lambda: [normal(keys, LENGTH, WIDTH)]) == (1, 0)


def test_generation_compiles_nothing(fusion):
    query, key = (leaf(ROWS, LENGTH, HEADS, WIDTH) for _ in range(2))
    rope = Rope.of(torch.arange(LENGTH).repeat(ROWS, 1), WIDTH, 1e4)
    with torch.no_grad():
        assert kernels(lambda: rotate(query, key, rope)) == (0, 0)


def test_compiled_rope_loads_each_value_twice_and_each_angle_once(fusion):
    both = leaf(ROWS, LENGTH, HEADS, 2 * WIDTH)
    rope = Rope.of(torch.arange(LENGTH).repeat(ROWS, 1), WIDTH, 1e4)
    _, (code, *_) = run_and_get_code(rotate, both[..., :WIDTH], both[..., WIDTH:], rope)
    body = code[code.index('extern "C"') :].partition("{")[2]
    # queries, keys, both with their pairs exchanged, cosines and sines
    assert len(re.findall(r"\bin_ptr\d+( \+|\[)", body)) == 6


@pytest.mark.slow
def test_recomputed_layers_round_as_those_that_are_kept(fusion):
    config = BaseLCMConfig(
        embed_dim=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, dropout=0.1
    )
    model = BaseLCM(config).initialize(1).bfloat16().train()
    concepts, keys = torch.randn(2, 8, 8), torch.tensor([4, 5])
    kept = model(concepts, dropout_keys=keys)
    # As DeepSpeed's: the first pass through a layer is without gradients.
    model.recompute = lambda call, x: checkpoint(call, x, use_reentrant=True)
    assert torch.equal(model(concepts, dropout_keys=keys), kept)
