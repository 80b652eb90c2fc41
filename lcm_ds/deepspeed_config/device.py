"""What a DeepSpeed JSON asks of the machine: a device, a precision, operators that DeepSpeed compiles at first use."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcm_ds.deepspeed_config.resolver import offloads_optimizer, precision
from lcm_ds.errors import InputError
from lcm_ds.processes import program_path


def check_device(mapping: dict[str, Any], origin: str | Path) -> None:
    """Check that this machine has the device, supports its precision, and can compile the operators that a run needs.

    Raises InputError with a line for each that it does not.
    """
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    kind = device.device_name()
    if kind != "cpu" and device.device_count() == 0:
        raise InputError(f"DS_ACCELERATOR={kind}: this process sees no such device; unset it, or see nvidia-smi")
    errors = []
    supported = {"float16": device.is_fp16_supported, "bfloat16": device.is_bf16_supported}
    dtype = precision(mapping)
    if dtype in supported and not supported[dtype]():
        alternative = "fp32" if dtype == "bfloat16" else "bf16 or fp32"
        errors.append(f"DeepSpeed does not support {dtype} on this device ({kind}); use {alternative}")
    for key, name in operators(mapping):
        builder = device.create_op_builder(f"{name}Builder")
        if builder is None or type(builder).__name__ == "NotImplementedBuilder":
            errors.append(f"{key}: DeepSpeed has no kernels for it on this device ({kind})")
        elif name == "AsyncIO" and not builder.is_compatible(verbose=False):
            errors.append(f"{key}: 'nvme' needs libaio with its headers (libaio-dev)")
        elif lacking := missing_to_compile(builder):
            errors.append(f"{key}: DeepSpeed's {name} cannot be compiled without {', '.join(lacking)}")
    if errors:
        raise InputError([f"{origin}: {error}" for error in errors])


def operators(mapping: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The operators of DeepSpeed that a run needs, as (key of the JSON, name of the operator without "Builder").

    By DeepSpeed 0.19.8: `get_optimizer_configuration` and `_configure_basic_optimizer` of its engine, the swappers of
    `offload_*` to NVMe, and `CUDAQuantizer`. Muon is built by lcm-ds, with torch's AdamW.
    """
    optimizer, zero = mapping.get("optimizer") or {}, mapping.get("zero_optimization") or {}
    kind, params = optimizer.get("type", "AdamW").lower(), optimizer.get("params") or {}
    on_cpu = offloads_optimizer(mapping)
    if kind in ("adam", "adamw") and optimizer and not params.get("torch_adam"):
        yield "optimizer.params.torch_adam", "CPUAdam" if on_cpu else "FusedAdam"
    elif kind == "lion":
        yield "optimizer.type", "CPULion" if on_cpu else "FusedLion"
    elif kind == "adagrad" and on_cpu:
        yield "optimizer.type", "CPUAdagrad"
    elif kind == "lamb":
        yield "optimizer.type", "FusedLamb"
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device") == "nvme":
            yield f"zero_optimization.{key}.device", "AsyncIO"
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if zero.get(key):
            yield f"zero_optimization.{key}", "Quantizer"


def missing_to_compile(builder: Any) -> list[str]:
    """What this machine lacks to compile an operator, given DeepSpeed's builder of it, and how to get it.

    Empty if the operator is built into DeepSpeed. One that was compiled before needs only ninja and CUDA's folder, and
    nvcc if DeepSpeed asks for its version at each load.
    """
    from deepspeed.ops.op_builder.pin_memory import PinMemoryBuilder

    builders = [builder, *([PinMemoryBuilder()] if builder.NAME == "async_io" else [])]  # which its `load` loads first
    return list(dict.fromkeys(lacking for each in builders for lacking in _missing(each)))


def _missing(builder: Any) -> list[str]:
    from deepspeed.git_version_info import installed_ops

    if installed_ops.get(builder.NAME):
        return []
    compiled = _is_compiled(builder.NAME)
    path = program_path()
    lacking = [] if shutil.which("ninja", path=path) else ["ninja (pip install ninja)"]
    if not compiled:
        if not shutil.which(os.environ.get("CXX", "g++"), path=path):
            lacking.append("g++ (apt install g++)")
        if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
            lacking.append("Python's headers (apt install python3-dev)")
    return lacking + _missing_cuda(builder, compiled)


def _missing_cuda(builder: Any, compiled: bool) -> list[str]:
    """CUDA's compiler, unless it is here with torch's major version; nothing for operators that run on the host."""
    import torch
    from deepspeed.ops.op_builder.builder import CUDAOpBuilder, MissingCUDAException, installed_cuda_version
    from torch.utils import cpp_extension

    if not isinstance(builder, CUDAOpBuilder) or builder.is_rocm_pytorch():
        return []
    wanted = torch.version.cuda or ""
    if cpp_extension.CUDA_HOME is None:
        return [f"nvcc (install the toolkit of CUDA {wanted}, and set CUDA_HOME)"]
    asks_nvcc = type(builder).nvcc_args is CUDAOpBuilder.nvcc_args  # by DeepSpeed 0.19.8, at each load
    if compiled and not asks_nvcc:
        return []
    try:
        found = [*installed_cuda_version()]
    except MissingCUDAException:
        return [
            f"nvcc, which {cpp_extension.CUDA_HOME}/bin lacks (install the toolkit of CUDA {wanted}, set CUDA_HOME)"
        ]
    # DeepSpeed 0.19.8 compares the versions only where operators are built in advance. One that is compiled at its
    # first use is linked with the libcudart of CUDA_HOME: with one of another major version than torch's.
    if not compiled and str(found[0]) != wanted.split(".")[0] and os.environ.get("DS_SKIP_CUDA_CHECK") != "1":
        here = ".".join(map(str, found))
        return [f"nvcc of CUDA {wanted}, torch's; CUDA_HOME={cpp_extension.CUDA_HOME} has {here}"]
    return []


def _is_compiled(name: str) -> bool:
    """Whether torch's cache of extensions has this one, for this Python and torch's device."""
    import torch
    from torch.utils import cpp_extension

    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:  # as torch.utils.cpp_extension._get_build_directory, which makes the folder
        hip, cuda = torch.version.hip, torch.version.cuda
        kind = f"rocm{hip}" if hip is not None else f"cu{cuda}" if cuda is not None else "cpu"
        python = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}"
        root = f"{cpp_extension.get_default_build_root()}/{python}_{kind.replace('.', '')}"
    return Path(root, name, f"{name}.so").is_file()
