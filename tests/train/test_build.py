"""Building a model takes the memory of its device and next to none of the host's, and gives the values of its seed."""

import json

import pytest
import torch
from build_worker import SIZES, digest
from deepspeed.utils import z3_leaf_module
from runs import launch_workers

from lcm_ds.model import modeling
from lcm_ds.model.config import resolve_model
from lcm_ds.model.modeling import BaseLCM
from lcm_ds.train import engine

BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(stage, *device) → what build_worker.py measures on two ranks."""
    folder = tmp_path_factory.mktemp("build")

    def measure(stage, *device):
        (folder / "json").write_text(json.dumps({"zero_optimization": {"stage": stage}, **BF16}))
        launch_workers("build_worker.py", folder / "json", folder / "result", *device)
        return json.loads((folder / "result").read_text())

    return measure


@pytest.fixture(scope="module")
def digests():
    """Hashes of the parameters, in bf16 after the model was built in fp32 as a whole."""
    model = BaseLCM(resolve_model(SIZES)).initialize(0).bfloat16()
    return {name: digest(parameter) for name, parameter in model.named_parameters()}


def test_a_model_in_half_precision_never_exists_in_fp32(build, digests):
    built = build(1)
    assert built["peak"] < 3  # 2 for the parameters; a copy in fp32 would be 4 more
    assert built["digests"] == digests


def test_a_partitioned_model_holds_only_its_share(build, digests):
    built = build(3)
    assert built["held"] < 1.6  # 1 for half of the parameters
    assert built["digests"] == digests


def test_the_host_needs_only_a_few_values_at_a_time_if_the_device_has_its_own_memory(build):
    assert build(1, "meta")["peak"] < 1


@pytest.mark.parametrize("inputs", [1, 3, 5, 7, 16, 21, 64, 67, 79, 80, 128, 131])
@pytest.mark.parametrize("outputs", [1, 4, 13])
def test_values_drawn_in_parts_are_those_drawn_at_once(monkeypatch, inputs, outputs):
    sizes = {"embed_dim": inputs, "hidden_size": outputs * 2, "num_attention_heads": 1, "intermediate_size": 4}
    config = resolve_model(SIZES.model_copy(update={**sizes, "num_hidden_layers": 1}))
    whole = BaseLCM(config).initialize(3)
    monkeypatch.setattr(modeling, "CHUNK", 64)
    parts = BaseLCM(config).initialize(3)
    for found, expected in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_layers_are_gathered_at_once_only_on_cpus_and_where_everything_is_trained(monkeypatch):
    """DeepSpeed reads the gradients of such a layer when that of its input is there, which nobody asks for then."""
    linear = engine.zero3_linear.LinearFunctionForZeroStage3
    monkeypatch.setattr(linear, "forward", linear.__dict__["forward"])  # put back afterwards

    def gathered(backend, frozen=None):
        monkeypatch.setattr(engine.dist, "get_backend", lambda: backend)
        model = BaseLCM(resolve_model(SIZES))
        if frozen:
            model.get_parameter(frozen).requires_grad_(False)
        engine.use_fewer_calls(model)
        return {z3_leaf_module(layer) for layer in model.layers}

    assert gathered("gloo") == {True}
    assert gathered("nccl") == gathered("gloo", "pre_net.weight") == {False}
    x, weight, bias = torch.randn(2, 3, 4).bfloat16(), torch.randn(5, 4).bfloat16(), torch.randn(5).bfloat16()
    assert torch.equal(linear.forward(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    assert linear.forward(x, weight, bias.float()).dtype == torch.float32
