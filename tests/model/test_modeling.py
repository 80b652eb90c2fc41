"""Base-LCM: its sizes, its initial weights, its precision, and what saving keeps."""

import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lcm_ds
from lcm_ds.config import ModelConfig
from lcm_ds.errors import InputError
from lcm_ds.model import modeling
from lcm_ds.model.config import PRESETS, BaseLCMConfig, resolve_model
from lcm_ds.model.flops import matrix_weights, training_flops
from lcm_ds.model.modeling import BaseLCM, RMSNorm
from lcm_ds.model.sizes import count_parameters, parameter_shapes

CASTS = [
    lambda model: model.bfloat16(),
    lambda model: model.half(),
    lambda model: model.to(torch.bfloat16),
    lambda model: model.half().float(),
    lambda model: model.to(device="cpu", dtype=torch.float16),
]


def parameters_of(preset):
    with torch.device("meta"):
        model = BaseLCM(resolve_model(ModelConfig(preset=preset)))
    return sum(parameter.numel() for parameter in model.parameters())


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_shapes_of_plans_are_those_of_the_model(preset):
    config = resolve_model(ModelConfig(preset=preset))
    with torch.device("meta"):
        model = BaseLCM(config)
    assert list(parameter_shapes(config).items()) == [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    assert count_parameters(config) == parameters_of(preset)


def test_the_largest_preset_has_exactly_metas_parameters():
    assert parameters_of("1.6b") == 1_649_185_792


def test_presets_have_the_sizes_of_their_names():
    assert 140e6 < parameters_of("150m") < 170e6
    assert 380e6 < parameters_of("400m") < 420e6
    assert 6.4e9 < parameters_of("7b") < 7.5e9
    assert parameters_of("quickstart") < 10e6
    assert set(PRESETS) == {"quickstart", "mini", "150m", "400m", "1.6b", "7b"}


def test_a_configs_own_keys_lie_over_the_preset():
    config = resolve_model(ModelConfig(preset="1.6b", num_hidden_layers=2, dropout=0.0))
    assert (config.num_hidden_layers, config.dropout) == (2, 0.0)
    assert config.hidden_size == 2048


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"preset": "1.7b"}, ["model.preset", "'1.7b'", "did you mean '1.6b'?"]),
        ({"preset": "quickstart", "num_attention_heads": 3}, ["model.hidden_size", "512", "num_attention_heads 3"]),
        # a head of one dimension has no pairs for RoPE to turn
        ({"preset": "quickstart", "hidden_size": 4}, ["model.hidden_size", "even multiple"]),
        ({"hidden_size": 64, "embed_dim": 8}, ["num_hidden_layers, num_attention_heads, intermediate_size"]),
    ],
)
def test_sizes_that_make_no_model_are_refused_in_one_line(model, told):
    with pytest.raises(InputError) as refused:
        resolve_model(ModelConfig(**model), origin="run.yaml")
    (line,) = refused.value.errors
    assert line.startswith("run.yaml: ")
    for part in told:
        assert part in line


def test_flops_of_a_tiny_model_counted_by_hand():
    config = BaseLCMConfig(
        embed_dim=3, hidden_size=4, num_hidden_layers=2, num_attention_heads=1, intermediate_size=5, dropout=0.0
    )
    # ends 3·4 each; a layer 4·(4·4) + 3·(4·5)
    assert matrix_weights(config) == 2 * 12 + 2 * (64 + 60)
    model = BaseLCM(config)
    assert matrix_weights(config) == sum(p.numel() for p in model.parameters() if p.ndim == 2)
    # segments of 2 and 3 concepts: 5 concepts, 3 + 6 pairs; attention 4·4 FLOPs a pair and layer
    forward = 2 * 272 * 5 + 2 * 16 * 9
    assert training_flops(config, concepts=5, pairs=9) == 3 * forward


# --- initial weights --------------------------------------------------------------------------------------------------


def test_initial_weights_depend_on_seed_and_config_alone(make_model):
    torch.manual_seed(1)
    one = make_model(seed=5)
    torch.manual_seed(2)
    other = make_model(seed=5)
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


def test_other_seeds_give_other_weights(make_model):
    one, other = (dict(make_model(seed=seed).named_parameters()) for seed in (5, 6))
    for name, weight in one.items():
        if weight.ndim == 2:
            assert (weight - other[name]).abs().max() > 0.01, name


def test_no_two_modules_start_with_the_same_weights(make_model):
    weights = [weight.flatten()[:64] for _, weight in make_model(seed=5).named_parameters() if weight.ndim == 2]
    for index, one in enumerate(weights):
        assert not any(torch.equal(one, other) for other in weights[:index])


def test_a_module_has_the_same_weights_whatever_order_or_dtype_it_is_filled_in(make_model):
    exact = make_model(seed=5)
    rough = make_model(seed=0).bfloat16()
    for parameters, fill in reversed(list(rough.initialization(5))):
        assert parameters
        fill()
    for name, weight in exact.named_parameters():
        assert torch.equal(weight.bfloat16(), dict(rough.named_parameters())[name]), name


def test_what_is_added_to_the_residual_stream_starts_smaller_in_deeper_models(make_model):
    model = make_model(hidden_size=256, num_hidden_layers=8, initializer_range=0.02, embed_dim=256)
    layer = model.layers[3]
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for end in (layer.self_attn.o_proj, layer.mlp.down_proj, model.post_net):
        assert end.weight.std().item() == pytest.approx(0.02 / 16**0.5, rel=0.05)
        assert end.bias.abs().max() == 0
    assert (model.norm.weight == 1).all()


# --- forward ----------------------------------------------------------------------------------------------------------


def test_inputs_are_normalised_and_noise_is_added_in_normalised_space(make_model):
    model = make_model()
    concepts, noise = torch.randn(2, 2, 5, 12)
    center, scale = model.normalizer.center, model.normalizer.scale
    by_hand = model(center + scale * ((concepts - center) / scale + noise))
    assert torch.allclose(model(concepts, noise=noise), by_hand, atol=1e-4)
    assert not torch.allclose(model(concepts), by_hand, atol=1e-2)


def test_bf16_is_near_fp32(make_model):
    model = make_model()
    concepts = torch.randn(4, 16, 12)
    exact = model(concepts)
    rough = model.bfloat16()(concepts)
    assert rough.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(exact, rough.float(), dim=-1).min() > 0.999


def test_dropout_acts_in_training_only(make_model):
    model = make_model(dropout=0.5)
    concepts = torch.randn(1, 6, 12)
    assert torch.equal(model(concepts), model(concepts))
    model.train()
    first, second = (model(concepts, dropout_keys=torch.tensor([key])) for key in (1, 2))
    assert not torch.equal(first, second)


def test_recomputed_activations_give_the_same_gradients(make_model):
    model = make_model(dropout=0.3).train()
    concepts = torch.randn(2, 6, 12)
    calls = []

    def recompute(call, hidden):
        calls.append(call.func)
        return checkpoint(call, hidden, use_reentrant=False)

    gradients = []
    for hook in (None, recompute):
        model.recompute = hook
        model.zero_grad()
        model(concepts, dropout_keys=torch.tensor([1, 2])).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert calls == list(model.layers)
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_module", [False, True])  # as under ZeRO-3
def test_recomputed_swiglu_gives_the_same_bits(make_model, dtype, by_module):
    model = make_model(dropout=0.3).train().to(dtype)
    if by_module:
        for layer in model.layers:
            layer.mlp.down_proj.weight.ds_id = 0
    concepts, keys = torch.randn(2, 6, 12), torch.tensor([1, 2])
    results = []
    for recompute in (False, True):
        for layer in model.layers:
            layer.mlp.recompute = recompute
        model.zero_grad()
        predictions = model(concepts, dropout_keys=keys)
        predictions.float().square().sum().backward()
        results.append([predictions, *(parameter.grad for parameter in model.parameters())])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


# --- the normaliser, saving and loading -------------------------------------------------------------------------------


def test_the_normaliser_maps_there_and_back(make_model):
    normalizer = make_model().normalizer
    concepts = torch.randn(50, 12) * 3
    assert torch.allclose(normalizer.denormalize(normalizer.normalize(concepts)), concepts, atol=1e-5)
    assert torch.equal(normalizer.normalize(normalizer.center), torch.zeros(12))
    assert torch.allclose(normalizer.normalize(normalizer.center + normalizer.scale), torch.ones(12), atol=1e-5)
    assert normalizer.normalize(concepts.half()).dtype == torch.float32


@pytest.mark.parametrize("cast", CASTS, ids=["bfloat16", "half", "to", "half-float", "to-device-and-dtype"])
def test_the_normaliser_keeps_every_bit_through_casts(make_model, cast):
    model = make_model()
    center, scale = model.normalizer.center.clone(), model.normalizer.scale.clone()
    cast(model)
    assert model.normalizer.center.dtype == model.normalizer.scale.dtype == torch.float32
    assert torch.equal(model.normalizer.center, center)
    assert torch.equal(model.normalizer.scale, scale)


def test_the_normaliser_moves_with_the_model(make_model):
    moved = make_model().to("meta")
    assert moved.normalizer.center.device.type == moved.normalizer.scale.device.type == "meta"
    assert moved.normalizer.center.dtype == torch.float32


def test_saving_and_loading_changes_no_bit(make_model, tmp_path):
    model = make_model(dropout=0.1, rope_theta=500.0)
    lcm_ds.BaseLCM.of(model).save_pretrained(tmp_path)
    loaded = lcm_ds.BaseLCM.from_pretrained(tmp_path)
    assert loaded.config.sizes() == model.config.sizes()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    concepts = torch.randn(1, 5, 12)
    assert torch.equal(loaded.eval()(concepts), model(concepts))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_loading_in_half_precision_keeps_the_normaliser_exact(make_model, tmp_path, stored):
    model = make_model()
    center, scale = model.normalizer.center.clone(), model.normalizer.scale.clone()
    lcm_ds.BaseLCM.of(model.to(stored)).save_pretrained(tmp_path)
    loaded = lcm_ds.BaseLCM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.pre_net.weight.dtype == torch.bfloat16
    assert loaded.normalizer.center.dtype == torch.float32
    assert torch.equal(loaded.normalizer.center, center)
    assert torch.equal(loaded.normalizer.scale, scale)


# --- what it stands on ------------------------------------------------------------------------------------------------


def test_the_model_needs_no_training_and_no_text_libraries():
    code = (
        "import sys, lcm_ds.model.modeling, lcm_ds.convert.base_lcm, lcm_ds.model.flops\n"
        "print([m for m in ('deepspeed', 'spacy', 'datasets', 'sentence_transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 7, 48), (48,), (5, 48)], ids=str)
def test_the_norm_on_cpus_is_rms_norm_and_keeps_only_its_input(monkeypatch, dtype, shape):
    monkeypatch.setattr(modeling, "CACHED", 4 * 48)  # several parts, the last one smaller
    norm = RMSNorm(48, 1e-5).to(dtype)
    norm.weight.data = (torch.rand(48) + 0.5).to(dtype)
    x, weights = torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(shape, dtype=dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = norm(x)
    expected = torch.nn.functional.rms_norm(x, (48,), norm.weight, 1e-5)
    inputs = x, norm.weight
    close = 4 * torch.finfo(dtype).eps + 1e-6 * (dtype == torch.float32)
    for ours, right in zip(
        (found, *torch.autograd.grad(found, inputs, weights)),
        (expected, *torch.autograd.grad(expected, inputs, weights)),
        strict=True,
    ):
        assert ours.dtype == right.dtype
        assert (ours - right).norm() <= close * right.norm()
    own = [tensor for tensor in kept if tensor.numel() == x.numel() and tensor.data_ptr() != norm.weight.data_ptr()]
    assert [tensor.data_ptr() for tensor in own] == [x.data_ptr()]
