"""Functions of a few elementwise operations, compiled to one kernel for models whose layers are not compiled.

Those are eager runs on a GPU, where each operation would be a kernel, and ZeRO-3, whose hooks break compiled layers. In
a compiled layer the functions are part of its graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_enabled = False


def enable_fusion(enabled: bool = True) -> None:
    """Let `fused` functions be compiled from now on, in this process; they need a working torch.compile."""
    global _enabled
    _enabled = enabled


def fused(function: Callable[P, T]) -> Callable[P, T]:
    """Compile a function by itself in training, if that is enabled; generation, with its many shapes, stays eager."""
    compiled = torch.compile(function, dynamic=False)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if _enabled and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return compiled(*args, **kwargs)
        return function(*args, **kwargs)

    return call
