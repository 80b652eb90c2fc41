"""Functions of a few elementwise operations, compiled to one kernel for models whose layers are not compiled.

Those are eager runs on a GPU, where each operation would be a kernel, and ZeRO-3, whose hooks break compiled layers. In
a compiled layer the functions are part of its graph.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch.utils._triton import has_triton

P = ParamSpec("P")
T = TypeVar("T")

_enabled = False


def enable_fusion(enabled: bool = True) -> None:
    """Let `fused` functions be compiled from now on, in this process; they need a working torch.compile."""
    global _enabled
    _enabled = enabled


def gpu_compiles() -> bool:
    """Whether this process has a GPU and what torch.compile needs to make kernels for it: Triton and a C compiler."""
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["cc", "gcc", "clang"]
    return torch.cuda.is_available() and has_triton() and any(map(shutil.which, compilers))


def fused(function: Callable[P, T]) -> Callable[P, T]:
    """Compile a function by itself in training, if that is enabled; generation, with its many shapes, stays eager."""
    compiled = torch.compile(function, dynamic=False)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if _enabled and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return compiled(*args, **kwargs)
        return function(*args, **kwargs)

    return call
