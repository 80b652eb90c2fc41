"""Functions of a few elementwise operations, compiled to one kernel for models whose layers are not compiled.

Those are eager runs on a GPU, where each operation would be a kernel, and ZeRO-3, whose hooks break compiled layers. In
a compiled layer the functions are part of its graph.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch.utils._triton import has_triton

P = ParamSpec("P")
T = TypeVar("T")

_enabled = _training = False


def enable_fusion(enabled: bool = True) -> None:
    """Let `fused` functions be compiled from now on, in this process; they need a working torch.compile."""
    global _enabled
    _enabled = enabled


def gpu_compiles() -> bool:
    """Whether this process has a GPU and what Triton needs to make kernels: a C compiler and Python's headers."""
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["cc", "gcc", "clang"]
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    # has_triton comes last: it imports torch's compiler.
    return torch.cuda.is_available() and any(map(shutil.which, compilers)) and headers.is_file() and has_triton()


@contextmanager
def training_pass(training: bool) -> Iterator[None]:
    """Marks the forward pass of a model; with `training` its functions are fused even without gradients.

    Such is the first pass through layers that are recomputed: it has to round as the second one does.
    """
    global _training
    before, _training = _training, training
    try:
        yield
    finally:
        _training = before


def fused(function: Callable[P, T]) -> Callable[P, T]:
    """Compile a function separately in training, if that is enabled; generation, with its many shapes, stays eager."""

    @cache
    def compiled() -> Callable[P, T]:
        return torch.compile(function, dynamic=False)  # imports torch's compiler, a thousand modules

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling() or not _enabled:
            return function(*args, **kwargs)
        return (compiled() if _training or torch.is_grad_enabled() else function)(*args, **kwargs)

    return call
