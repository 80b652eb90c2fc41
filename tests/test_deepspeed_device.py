"""What a machine lacks for a DeepSpeed JSON is said before a model is built, in one line for each key."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import deepspeed.accelerator
import pytest
import torch
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.ops.op_builder.builder import MissingCUDAException, OpBuilder
from deepspeed.runtime.engine import DeepSpeedEngine
from torch.utils import cpp_extension

from lcm_ds.deepspeed_config import check_device
from lcm_ds.deepspeed_config.device import _is_compiled, missing_to_compile, operators
from lcm_ds.errors import InputError

JSONS = {path.stem: json.loads(path.read_text()) for path in Path(__file__).parents[1].glob("ds_configs/*.json")}
OFFLOADED = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
FUSED = {"optimizer": {"type": "AdamW", "params": {}}}


def errors_of(mapping):
    try:
        check_device(mapping, "f.json")
    except InputError as error:
        return error.errors
    return []


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
    """on_gpu(nvcc=VERSION, torch_cuda=VERSION): a machine with a GPU, ninja and g++; nvcc None: no CUDA toolkit."""

    def machine(nvcc=None, torch_cuda="13.0", devices=1):
        accelerator = CUDA_Accelerator()
        accelerator.device_count = lambda: devices
        monkeypatch.setattr(deepspeed.accelerator, "get_accelerator", lambda: accelerator)
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", None if nvcc is None else str(tmp_path / "cuda"))
        if nvcc:
            program = tmp_path / "cuda" / "bin" / "nvcc"
            program.parent.mkdir(parents=True)
            program.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {nvcc}, V{nvcc}.1\n")
            program.chmod(0o755)

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return machine


@pytest.fixture
def without_compilers(monkeypatch, tmp_path):
    monkeypatch.setattr("lcm_ds.deepspeed_config.device.program_path", lambda: str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))


@pytest.mark.parametrize("name", sorted(name for name in JSONS if "offload" not in name and "nvme" not in name))
def test_shipped_jsons_without_offload_need_no_compiler(name, on_gpu, without_compilers):
    on_gpu()
    needed = [key for key, _ in operators(JSONS[name])]
    quantized = ["zero_optimization.zero_quantized_weights", "zero_optimization.zero_quantized_gradients"]
    assert needed == (quantized if name == "zeropp" else [])
    if not needed:
        assert errors_of(JSONS[name]) == []


@pytest.mark.parametrize(
    ("nvcc", "lacking"),
    [
        (None, "nvcc (install the toolkit of CUDA 13.0, and set CUDA_HOME)"),
        ("", "nvcc, which CUDA_HOME/bin lacks (install the toolkit of CUDA 13.0, set CUDA_HOME)"),
        ("12.8", "nvcc of CUDA 13.0, torch's; CUDA_HOME=CUDA_HOME has 12.8"),
        ("13.2", None),
        ("13.0", None),
    ],
)
def test_without_torch_s_cuda_an_operator_for_gpus_is_refused(nvcc, lacking, on_gpu, tmp_path):
    on_gpu(nvcc)
    line = f"f.json: optimizer.params.torch_adam: DeepSpeed's FusedAdam cannot be compiled without {lacking}"
    expected = [line.replace("CUDA_HOME/", f"{tmp_path}/cuda/").replace("=CUDA_HOME ", f"={tmp_path}/cuda ")]
    assert errors_of(FUSED) == ([] if lacking is None else expected)


def test_deepspeed_s_variable_accepts_another_cuda(on_gpu, monkeypatch):
    on_gpu("12.8")
    monkeypatch.setenv("DS_SKIP_CUDA_CHECK", "1")
    assert errors_of(FUSED) == []


def test_the_optimizer_on_the_host_needs_no_cuda(on_gpu):
    on_gpu()
    assert errors_of({**FUSED, "zero_optimization": OFFLOADED}) == []


def test_nor_a_compiler_if_it_was_compiled_before(without_compilers, monkeypatch, tmp_path):
    mapping = {**FUSED, "zero_optimization": OFFLOADED}
    (line,) = errors_of(mapping)
    assert "DeepSpeed's CPUAdam cannot be compiled without ninja (pip install ninja), g++ (apt install g++)" in line
    compiled = tmp_path / "extensions/cpu_adam/cpu_adam.so"
    compiled.parent.mkdir(parents=True)
    compiled.touch()
    (line,) = errors_of(mapping)
    assert line.endswith("cannot be compiled without ninja (pip install ninja)")
    (tmp_path / "ninja").touch(0o755)
    assert errors_of(mapping) == []


@pytest.fixture
def compiled_before(tmp_path):
    """compiled_before(NAME, …): operators that torch's cache of extensions has."""

    def compiled(*names):
        for name in names:
            (tmp_path / "extensions" / name).mkdir(parents=True)
            (tmp_path / "extensions" / name / f"{name}.so").touch()

    return compiled


@pytest.mark.parametrize(
    ("name", "asks"), [("Quantizer", True), ("AsyncIO", True), ("FusedAdam", False), ("FusedLamb", False)]
)
def test_compiled_before_it_needs_nvcc_if_deepspeed_asks_for_its_version_at_each_load(
    name, asks, on_gpu, compiled_before, monkeypatch
):
    on_gpu(nvcc="")  # a CUDA_HOME without nvcc
    builder = deepspeed.accelerator.get_accelerator().create_op_builder(f"{name}Builder")
    compiled_before(builder.NAME, "pin_memory")
    lacking = missing_to_compile(builder)
    assert [line.split(" which")[0] for line in lacking] == (["nvcc,"] if asks else [])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    builder.jit_mode = True
    if asks:
        with pytest.raises(MissingCUDAException):
            builder.nvcc_args()
    else:
        builder.nvcc_args()


def test_async_io_is_not_compiled_without_the_operator_that_it_loads_first(
    on_gpu, compiled_before, monkeypatch, tmp_path
):
    on_gpu("13.0")
    monkeypatch.setattr("lcm_ds.deepspeed_config.device.program_path", lambda: str(tmp_path))
    (tmp_path / "ninja").touch(0o755)
    builder = deepspeed.accelerator.get_accelerator().create_op_builder("AsyncIOBuilder")
    loaded = []
    monkeypatch.setattr(OpBuilder, "load", lambda self, verbose=True: loaded.append(self.NAME))
    monkeypatch.delattr(sys, "_deepspeed_pin_memory_op_module", raising=False)
    builder.load()
    assert loaded == ["pin_memory", "async_io"]
    monkeypatch.delattr(sys, "_deepspeed_pin_memory_op_module")
    compiled_before("async_io")
    assert missing_to_compile(builder) == ["g++ (apt install g++)"]
    compiled_before("pin_memory")
    assert missing_to_compile(builder) == []


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_compiled_is_what_torch_would_load_with_this_python(cuda, monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    for other in ("py37_cpu", "py311_cu118", "py36_cu130"):
        other_python = tmp_path / other.replace("py311", f"py{sys.version_info.major}{sys.version_info.minor}")
        (other_python / "fused_adam").mkdir(parents=True)
        (other_python / "fused_adam/fused_adam.so").touch()
    assert not _is_compiled("fused_adam")
    Path(cpp_extension._get_build_directory("fused_adam", verbose=False), "fused_adam.so").touch()
    assert _is_compiled("fused_adam")


def test_every_key_that_asks_too_much_has_its_line(on_gpu):
    on_gpu()
    zero = {"stage": 3, "zero_quantized_weights": True, "offload_optimizer": {"device": "nvme"}}
    lines = errors_of({"optimizer": {"type": "Lamb"}, "zero_optimization": zero})
    keys = ["optimizer.type", "zero_optimization.offload_optimizer.device", "zero_optimization.zero_quantized_weights"]
    assert [line.split(": ")[1] for line in lines] == keys


def test_operators_that_the_device_does_not_have_are_refused():
    if deepspeed.accelerator.get_accelerator().device_name() != "cpu":
        pytest.skip("a GPU has them")
    for kind in ("Lamb", "Lion"):
        assert errors_of({"optimizer": {"type": kind}}) == [
            "f.json: optimizer.type: DeepSpeed has no kernels for it on this device (cpu)"
        ]


def test_an_accelerator_without_a_device_is_refused(on_gpu):
    on_gpu(devices=0)
    assert errors_of({}) == ["DS_ACCELERATOR=cuda: this process sees no such device; unset it, or see nvidia-smi"]


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize(
    ("kind", "params"),
    [("Adam", {}), ("AdamW", {}), ("AdamW", {"torch_adam": True}), ("Adagrad", {}), ("Lion", {}), ("SGD", {})],
)
def test_they_are_the_operators_that_deepspeed_loads(kind, params, offloaded, monkeypatch):
    loaded = []
    monkeypatch.setattr(OpBuilder, "load", lambda self, verbose=True: loaded.append(self.NAME) or MagicMock())
    mapping = {"optimizer": {"type": kind, "params": params}, "zero_optimization": OFFLOADED if offloaded else {}}
    builder = deepspeed.accelerator.get_accelerator().create_op_builder
    expected = [builder(f"{name}Builder") for _, name in operators(mapping)]
    if any(type(each).__name__ == "NotImplementedBuilder" for each in expected):
        pytest.skip("this device does not have it")
    engine = SimpleNamespace(
        optimizer_params=lambda: params,
        optimizer_name=lambda: kind if kind == "SGD" else kind.lower(),
        zero_use_cpu_optimizer=lambda: offloaded,
        bf16_optimizer_states=lambda: False,
        zenflow=False,
    )
    engine.get_optimizer_configuration = lambda *them: DeepSpeedEngine.get_optimizer_configuration(engine, *them)
    DeepSpeedEngine._configure_basic_optimizer(engine, [torch.nn.Parameter(torch.ones(2))])
    assert loaded == [each.NAME for each in expected]
