"""A step is the same however it is computed: kernels, compilation, recomputation, ZeRO stages, micro-batches, packing.

All variants share one launch of two ranks (steps_worker.py). Tolerances: 1e-5 of a loss over ten steps and 1e-4 of a
gradient's norm in fp32, where only the order of sums differs; 3 % and 5 % in bf16, whose numbers have 8 bits, and fp16.
"""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from runs import launch_workers
from safetensors.torch import load_file
from steps_worker import CONFIG, EMBED_DIM, ROWS, batches, rows
from torch.utils._python_dispatch import TorchDispatchMode

from lcm_ds import deepspeed_config
from lcm_ds.config import TrainConfig
from lcm_ds.data.batch import target_mask
from lcm_ds.model.attention import SegmentLayout
from lcm_ds.model.config import resolve_model
from lcm_ds.model.modeling import BaseLCM
from lcm_ds.train.job import TrainJob
from lcm_ds.train.loss import input_noise, row_keys
from lcm_ds.train.monitoring.histograms import group_of
from lcm_ds.train.step import Stepper

pytestmark = pytest.mark.timeout(900)  # one launch takes most of the time
ROOT = Path(__file__).parent.parent.parent
SHIPPED = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))
RECOMPUTES = {"activation_checkpointing": {}}


def zero(stage, **more):
    return {"zero_optimization": {"stage": stage}, **more}


def fp8(stage=1, **more):
    """deepspeed and train of a run with products in fp8."""
    bf16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return {"deepspeed": zero(stage, **bf16, **more), "train": {"precision": "fp8-emulated"}}


# Their gradients are compared with those of zero1_bf16.
IN_FP8 = {
    "fp8": fp8(),
    "fp8, zero 2": fp8(2),
    "fp8, accumulated over 2": {**fp8(), "batch": {"micro_batch_rows": 2}},
    "fp8, recomputed": fp8(**RECOMPUTES),
}
PRODUCTS = {"kernels": {"attention": "products", "products": "torch"}}  # the other way of each piece
VARIANTS = {
    "zero 0": {"deepspeed": zero(0)},
    "zero 1": {"deepspeed": zero(1)},
    "zero 2": {"deepspeed": zero(2)},
    "zero 3": {"deepspeed": zero(3)},
    "accumulated over 2": {"deepspeed": zero(2), "batch": {"micro_batch_rows": 2}},
    "accumulated over 4": {"deepspeed": zero(2), "batch": {"micro_batch_rows": 1}},
    "compiled": {"train": {"compile": True}},
    "compiled, zero 3": {"deepspeed": zero(3), "train": {"compile": True}},
    "recomputed": {"deepspeed": zero(1, **RECOMPUTES)},
    "every second recomputed": {"deepspeed": zero(2), "train": {"recompute": "layer", "recompute_every": 2}},
    "recomputed, zero 3": {"deepspeed": zero(3, **RECOMPUTES)},
    "SwiGLU recomputed": {"train": {"recompute": "swiglu"}},
    "SwiGLU recomputed, zero 3": {"deepspeed": zero(3), "train": {"recompute": "swiglu"}},
    "SwiGLU recomputed, compiled": {"train": {"recompute": "swiglu", "compile": True}},
    "recomputed, compiled": {"deepspeed": zero(1, **RECOMPUTES), "train": {"compile": True}},
    "other kernels": {"train": PRODUCTS},
    "other kernels, compiled": {"train": {**PRODUCTS, "compile": True}},
    "other kernels, recomputed": {"deepspeed": zero(1, **RECOMPUTES), "train": PRODUCTS},
    "other kernels, zero 3": {"deepspeed": zero(3), "train": PRODUCTS},
}


# Combinations of what others test, and those that wait for a compiler.
SLOW = {
    *(name for name in SHIPPED if "offload" in name),
    "compiled, zero 3",
    "other kernels, compiled",
    "recomputed, compiled",
    "SwiGLU recomputed, compiled",
    "SwiGLU recomputed, zero 3",
    "recomputed, zero 3",
    "accumulated over 4",
    "fp8, zero 2",
    "fp8, accumulated over 2",
    "fp8, recomputed",
}


def variants(*names):
    """Parameters of a test."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    """Losses, and gradients at the first step, of the variants and shipped configs of all tests that were selected."""
    folder = tmp_path_factory.mktemp("steps")
    asking = [item for item in request.session.items if item.path == request.path and "results" in item.fixturenames]
    calls = [item.callspec for item in asking if hasattr(item, "callspec")]
    wanted = {"zero 1", "zero1_bf16", *(call.params["name"] for call in calls if "name" in call.params)}
    wanted |= {"fp8"} if wanted & IN_FP8.keys() else set()  # the others are compared with it
    nvme = folder / "nvme"
    nvme.mkdir()
    shipped = {}
    for name in SHIPPED:
        text = (ROOT / "ds_configs" / f"{name}.json").read_text().replace("/local_nvme", str(nvme))
        shipped[name] = {"deepspeed": json.loads(text)}
    known = {**VARIANTS, **IN_FP8, **shipped}
    # Those that import torch's compiler come last: it stays imported.
    known = {name: known[name] for name in sorted(known, key=compiles) if name in wanted}
    (folder / "variants.json").write_text(json.dumps(known))
    outputs = [folder / "results.json", folder / "gradients.safetensors"]
    launch_workers("steps_worker.py", folder / "variants.json", *outputs)
    gradients = {}
    for key, gradient in load_file(outputs[1]).items():
        name, parameter = key.rsplit("/", 1)
        gradients.setdefault(name, {})[parameter] = gradient
    return json.loads(outputs[0].read_text()), gradients


def compiles(name):
    """Whether a variant imports torch's compiler: DeepSpeed has its Muon compiled, torchao imports it."""
    return any(word in name for word in ("compiled", "muon", "fp8"))


def distance(found, expected):
    """The distance of two sets of gradients, relative to the norm of the second."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - gradient).norm() / gradient.norm()) for name, gradient in expected.items())


@pytest.fixture(scope="module")
def one_at_a_time():
    """Loss and gradients of the first step without the loop: segments one by one, plain attention."""
    config = TrainConfig.model_validate(CONFIG)
    model = BaseLCM(resolve_model(config.model)).initialize(config.seed).train()
    generator = torch.Generator().manual_seed(2)
    center = torch.randn(EMBED_DIM, generator=generator) / 10
    model.normalizer.set(center.numpy(), (torch.rand(EMBED_DIM, generator=generator) + 0.5).numpy())
    concepts, ids = rows()
    noise = input_noise(concepts, config.noise_std, row_keys("noise", ROWS, config.seed, 0, 0))
    keys = row_keys("dropout", ROWS, config.seed, 0, 0)
    targets = int(target_mask(ids).sum())
    truth = (concepts.float() - model.normalizer.center) / model.normalizer.scale
    # Dropout depends on the position in the row: a segment keeps its position, in an otherwise empty row.
    loss = torch.zeros(())
    for row in range(ROWS):
        for segment in set(ids[row].tolist()) - {-1}:
            segment_ids = torch.where(ids[row : row + 1] == segment, 0, -1).int()
            layout = SegmentLayout.from_ids(segment_ids, max_seqlen=16)
            predictions = model(concepts[row : row + 1], layout, noise[row : row + 1], keys[row : row + 1])
            mask = target_mask(segment_ids)[0]
            loss = loss + (predictions[0, :-1][mask] - truth[row, 1:][mask]).square().mean(-1).sum() / targets
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", variants(*VARIANTS))
def test_losses_and_gradients_agree(results, one_at_a_time, name):
    found, gradients = results
    loss, expected = one_at_a_time
    assert found[name]["losses"][0] == pytest.approx(loss, rel=1e-5)
    assert distance(gradients[name], expected) < 1e-4
    assert found[name]["losses"] == pytest.approx(found["zero 1"]["losses"], rel=1e-5)


EAGER = [name for name in (*VARIANTS, "zero1_bf16", "zero2_bf16", "zero3_bf16") if not compiles(name)]


@pytest.mark.parametrize("name", variants(*EAGER))
def test_a_rank_that_compiles_nothing_does_not_import_torchs_compiler(results, name):
    assert not results[0][name]["imported compiler"]


@pytest.mark.parametrize("name", variants(*IN_FP8))
def test_products_in_fp8_change_a_step_by_their_rounding(results, name):
    found, gradients = results
    assert found[name]["losses"] == pytest.approx(found["zero1_bf16"]["losses"], rel=3e-2)
    # A product is off by about 2⁻⁴ / √3 of itself (tests/model/test_float8.py). Up to four a layer follow each other in
    # the forward pass, and in the backward pass; their errors are independent.
    products = 2 * 4 * CONFIG["model"]["num_hidden_layers"]
    assert 0.02 < distance(gradients[name], gradients["zero1_bf16"]) < products**0.5 * 2**-4 / 3**0.5
    if name == "fp8, accumulated over 2":  # gradients of weights have a scale for each micro-batch
        assert 0 < distance(gradients[name], gradients["fp8"]) < 0.02
    else:
        assert found[name]["losses"] == found["fp8"]["losses"]
        assert distance(gradients[name], gradients["fp8"]) == 0


@pytest.mark.parametrize(
    "name", variants(*VARIANTS, "zero1_bf16", "zero2_bf16", "zero3_bf16", "zero2_offload", "zero3_offload")
)
def test_histograms_count_each_weight_and_each_gradient_of_the_global_batch_once(results, name):
    found, gradients = results
    rounded = found[name]["losses"] != pytest.approx(found["zero 1"]["losses"], rel=1e-5)
    of_gradients = {group_of(parameter, 3): [] for parameter in gradients[name]}
    for parameter, gradient in gradients[name].items():
        of_gradients[group_of(parameter, 3)].append(gradient.flatten())
    expected = {f"{what}/{group}" for what in ("weights", "gradients") for group in of_gradients}
    histograms = found[name]["histograms"]
    assert set(histograms) == expected
    for group, parts in of_gradients.items():
        values = torch.cat(parts)
        histogram, weights = histograms[f"gradients/{group}"], histograms[f"weights/{group}"]
        assert sum(histogram["counts"]) == sum(weights["counts"]) == len(values)
        assert histogram["sum_of_squares"] == pytest.approx(float(values.square().sum()), rel=1e-4)
        assert histogram["max"] == pytest.approx(float(values.max()), rel=1e-4)
        below = [0, *(int((values <= limit).sum()) for limit in histogram["limits"][:-1]), len(values)]
        counts = [b - a for a, b in itertools.pairwise(below)]
        assert sum(abs(a - b) for a, b in zip(counts, histogram["counts"], strict=True)) <= 0.01 * len(values)
        exact = found["zero 1"]["histograms"][f"weights/{group}"]
        assert weights["sum_of_squares"] == pytest.approx(exact["sum_of_squares"], rel=1e-2 if rounded else 1e-6)


def lacks(name):
    """The message with which this device refuses a shipped config."""
    device, text = get_accelerator(), (ROOT / "ds_configs" / f"{name}.json").read_text()
    quantizer = type(device.create_op_builder("QuantizerBuilder")).__name__
    has = {
        "support float16 on this device": '"fp16"' not in text or device.is_fp16_supported(),
        "support bfloat16 on this device": '"bf16"' not in text or device.is_bf16_supported(),
        "needs libaio": "nvme" not in text or device.create_op_builder("AsyncIOBuilder").is_compatible(verbose=False),
        "no kernels for it": "zero_quantized" not in text or quantizer != "NotImplementedBuilder",
    }
    return {reason for reason, there in has.items() if not there}


@pytest.mark.parametrize("name", variants(*SHIPPED))
def test_every_shipped_config_takes_ten_steps_or_is_refused_with_a_reason(results, name):
    found, gradients = results
    lacking, refused = lacks(name), found[name].get("refused", [])
    assert bool(refused) == bool(lacking)
    if refused:
        assert all(line.startswith("json: ") for line in refused)
        assert {reason for reason in lacking if any(reason in line for line in refused)} == lacking
        assert all(any(reason in line for reason in lacking) for line in refused)
        return
    losses = found[name]["losses"]
    assert len(losses) == 10
    assert losses[-1] < 0.9 * losses[0]
    exact, rough = found["zero 1"]["losses"], "fp32" not in name
    tolerance = 3e-2 if rough else 1e-5
    assert losses[0] == pytest.approx(exact[0], rel=tolerance)
    if name != "zero1_muon":  # another optimizer, with other updates
        assert losses == pytest.approx(exact, rel=tolerance)
        assert distance(gradients[name], gradients["zero 1"]) < (5e-2 if rough else 1e-4)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_is_valid_and_matches_its_name(name):
    mapping = deepspeed_config.read(str(ROOT / "ds_configs" / f"{name}.json"))
    clips = 0.0 if name == "zero1_muon" else 25.0
    config = TrainConfig.model_validate({**CONFIG, "optim": {"lr": 3e-4, "max_grad_norm": clips}})
    resolved = deepspeed_config.resolve(mapping, config, 2, name, hidden_size=256)
    assert "auto" not in json.dumps(resolved)
    what, _, precision = name.partition("_")
    assert f"zero{deepspeed_config.zero_stage(resolved)}" == what.replace("pp", "3")
    known = {"fp32": "float32", "fp16": "float16"}
    assert deepspeed_config.precision(resolved) == known.get(precision, "bfloat16")


class EngineWithoutData:
    """What a step calls of a DeepSpeed engine, around a model whose tensors have no data."""

    def __init__(self, model, accumulated):
        self.module, self.accumulated = model, accumulated
        self.basic_optimizer = torch.optim.AdamW(model.parameters())

    def __call__(self, *arguments):
        return self.module(*arguments)

    def train(self):
        self.module.train()

    def gradient_accumulation_steps(self):
        return self.accumulated

    def backward(self, loss, scale_wrt_gas):
        loss.backward()

    def step(self):
        """Updates nothing."""

    def get_global_grad_norm(self):
        return torch.tensor(0.5)  # DeepSpeed has it on the host

    def was_step_applied(self):
        return True


class Copies(TorchDispatchMode):
    """Keeps, of each copy from the host to the device, the tensor's first address and whether it is asynchronous."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        source = next((arg for arg in reversed(args) if isinstance(arg, torch.Tensor)), None)
        made = func(*args, **(kwargs or {}))
        if (
            func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
            and source.device.type == "cpu"
            and made.device.type == "meta"
        ):
            self.made.append((source.data_ptr(), func is torch.ops.aten._to_copy.default and kwargs["non_blocking"]))
        return made


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_host_never_waits_for_the_device_in_a_step(ranks, monkeypatch):
    # The device "meta" has no data: whatever reads a value of it, as `item`, `if` or `nonzero` do, is an error.
    config = TrainConfig.model_validate(CONFIG | {"noise_std": 0.1})
    model_config = resolve_model(config.model)
    with torch.device("meta"):
        model = BaseLCM(model_config)
    ds = {"optimizer": {"params": {"lr": 0.1}}}
    job = TrainJob(config, ds, model_config, [], None, SimpleNamespace(steps=None), "")  # type: ignore[arg-type]
    env = SimpleNamespace(world_size=ranks, rank=0)
    stepper = Stepper(job, env, EngineWithoutData(model, accumulated=2), torch.device("meta"))
    locked = set()

    def page_locked(tensor):
        kept.append(tensor)
        locked.add(tensor.data_ptr())
        return tensor

    kept, results = [], []
    monkeypatch.setattr(stepper, "_on_host", page_locked)
    monkeypatch.setattr("lcm_ds.train.step.dist.all_reduce", lambda tensor: None)
    monkeypatch.setattr("lcm_ds.train.step.PendingStep", lambda *arguments: results.append(arguments))
    upcoming = [*map(stepper.prepare, batches(SimpleNamespace(world_size=1, rank=0), 4))]
    locked |= {batch.concepts.data_ptr() for batch in upcoming}  # read into page-locked memory
    with Copies() as copies:
        stepper.step(iter(upcoming), 0, rank_flags=(True, False))
    # Counts of the step; of each micro-batch concepts, target mask, keys and the three tensors of its layout.
    assert len(copies.made) == 1 + 2 * 6
    assert all(address in locked and asynchronous for address, asynchronous in copies.made)
    ((values, _, norm, applied, _),) = results
    times = ranks if ranks > 1 else 0
    assert values.shape == (4 + 2 + times + 1,)  # counts, flags, times and the loss
    assert (norm, applied) == (0.5, True)
