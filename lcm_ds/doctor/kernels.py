"""`python -m lcm_ds.doctor.kernels [PART ...]`: what this machine's devices and kernels can do, as lines of JSON.

`lcm-ds doctor` runs each part in a separate process, which hides the output of libraries and survives a driver that
hangs or a kernel that crashes. Everything is tried, not looked up.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from lcm_ds.doctor.machine import COMPILER, KERNELS, MISSING, NONE, OK, WARN, Finding
from lcm_ds.launcher.multihost.probe import devices

# DeepSpeed's operators that a run may need, and their purpose.
OPERATORS = {
    "FusedAdam": "optimizers without torch_adam",
    "CPUAdam": "offload of the optimizer",
    "AsyncIO": "offload to NVMe",
    "Quantizer": "ZeRO++",
}


def kernels() -> Iterator[Finding]:
    """Try the imports, the device, the attention kernels and DeepSpeed's operators, one after the other."""
    yield from _attempt("imports", _imports, MISSING, "install that package again: no run can start")
    yield from _attempt("accelerator", accelerator, MISSING, "install torch and deepspeed again: no run can start")
    yield from _attempt("flash, packed rows", _varlen, WARN, "attention uses SDPA with a mask, which is slower")
    yield from _attempt("flash, SDPA", _sdpa, WARN, "attention uses another SDPA kernel, which is slower")
    for operator, purpose in OPERATORS.items():
        yield from _attempt(f"DeepSpeed {operator}", partial(_operator, operator, purpose), WARN, purpose)


def compiler() -> Iterator[Finding]:
    """Try torch.compile."""
    yield from _attempt("torch.compile", _compile, WARN, "leave train.compile off, or install g++ and Python's headers")


def _attempt(name: str, check: Callable[[], Iterator[Finding]], status: str, advice: str) -> Iterator[Finding]:
    """The findings of a check; if it raises, the error as a finding with this name, status and advice."""
    try:
        yield from check()
    except Exception as error:
        lines = str(error).strip().splitlines()
        yield Finding(name, status, f"{type(error).__name__}: {lines[0] if lines else ''}", advice)


def _imports() -> Iterator[Finding]:
    """Whether everything that a worker imports can be imported."""
    import lcm_ds.train.loop

    yield Finding("imports", OK, lcm_ds.train.loop.__name__)


def accelerator() -> Iterator[Finding]:
    """This machine's devices, the backend for communication between them, and their precisions."""
    import torch
    from deepspeed.accelerator import get_accelerator

    from lcm_ds.model.float8 import device_without_float8

    device = get_accelerator()
    kind, backend = device.device_name(), device.communication_backend_name()
    if kind == "cpu" and shutil.which("nvidia-smi") and not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
        yield Finding(
            "accelerator", WARN, f"cpu ({backend}): {reason}", "nvidia-smi is here: install torch for its CUDA"
        )
    elif kind == "cpu":
        yield Finding("accelerator", OK, f"cpu ({backend})")
    else:
        yield Finding("accelerator", OK, f"{kind} ({backend}), {device.device_count()} device(s)")
    for index in range(torch.cuda.device_count() if kind == "cuda" else 0):
        properties = torch.cuda.get_device_properties(index)
        yield Finding(f"cuda:{index}", OK, f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    halves = (("bf16", device.is_bf16_supported), ("fp16", device.is_fp16_supported))
    supported = [name for name, is_supported in halves if is_supported()]
    supported += ["fp8"] if device_without_float8() is None else []
    yield Finding("precisions", OK, ", ".join(["fp32", *supported]))


def _varlen() -> Iterator[Finding]:
    import torch
    from deepspeed.accelerator import get_accelerator

    from lcm_ds.model.attention import SegmentLayout, attend, uses_varlen

    name, dtype, width = "flash, packed rows", torch.bfloat16, 64
    if get_accelerator().device_name() != "cuda":
        yield Finding(name, NONE, "only on CUDA; attention uses SDPA with a mask")
        return
    device = torch.device("cuda")
    if not uses_varlen(device, dtype, width):
        yield Finding(name, WARN, "not for this GPU or torch", "attention uses SDPA with a mask, which is slower")
        return
    layout = SegmentLayout.from_ids(torch.zeros(1, 16, dtype=torch.int32), 16).prepared(device, dtype, width)
    query = torch.ones(1, 16, 1, width, device=device, dtype=dtype)
    attend(query, query, query, layout)
    torch.cuda.synchronize()
    yield Finding(name, OK, "varlen_attn")


def _sdpa() -> Iterator[Finding]:
    import torch
    from deepspeed.accelerator import get_accelerator
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query = torch.ones(1, 1, 16, 64, device=get_accelerator().current_device_name(), dtype=torch.bfloat16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True).sum().item()
    yield Finding("flash, SDPA", OK, "scaled_dot_product_attention")


def _compile() -> Iterator[Finding]:
    import torch

    values = torch.ones(64, device=devices()[0])
    torch.compile(lambda x: (x.sin() + 1).sum())(values).item()
    yield Finding("torch.compile", OK, "compiles")


def _operator(operator: str, purpose: str) -> Iterator[Finding]:
    """Whether an operator is built in, is compiled when first used, or cannot be compiled."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops

    from lcm_ds.deepspeed_config.device import missing_to_compile

    device, name = get_accelerator(), f"DeepSpeed {operator}"
    builder = device.create_op_builder(f"{operator}Builder")
    if builder is None or type(builder).__name__ == "NotImplementedBuilder":
        yield Finding(name, NONE, f"not for {device.device_name()} ({purpose})")
    elif installed_ops.get(builder.NAME):
        yield Finding(name, OK, f"built in ({purpose})")
    elif not builder.is_compatible(verbose=False):
        needs = (
            "apt install libaio-dev: libaio with its headers" if operator == "AsyncIO" else "ds_report shows the reason"
        )
        yield Finding(name, WARN, f"cannot be built here ({purpose})", needs)
    elif lacking := missing_to_compile(builder):
        yield Finding(name, WARN, f"cannot be compiled ({purpose})", f"needs {', '.join(lacking)}")
    else:
        yield Finding(name, OK, f"compiled when first used ({purpose})")


PARTS = {KERNELS: kernels, COMPILER: compiler}


def main(parts: Sequence[str]) -> None:
    """Print a line of JSON for each finding on the real stdout; all other output goes to stderr.

    Args:
        parts: Names in PARTS; none means all.
    """
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with contextlib.redirect_stdout(sys.stderr):
        for part in parts or PARTS:
            for finding in PARTS[part]():
                print(json.dumps(finding), file=out)


if __name__ == "__main__":
    main(sys.argv[1:])
