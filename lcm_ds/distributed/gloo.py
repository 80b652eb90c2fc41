"""Collectives of gloo, the backend of ranks on CPUs, built of those that send and copy least.

gloo's reduce-scatter in torch 2.13 is an all-reduce of which each rank keeps its part
(findings/gloo-reduce-scatter-sends-all.sh). Here each rank sends every other one its part of a sum. Gathers are a
broadcast of each rank's part, if the ranks are few. Measured on two ranks (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FEW_RANKS = 8  # each of which broadcasts its part in a gather


class SumOfParts:
    """Under way: the sum over ranks of the part of a tensor that belongs to this rank."""

    def __init__(self, tensor: Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None = None) -> None:
        """Send each rank its part.

        Args:
            tensor: [sum of sizes], contiguous; not to be changed before `wait` has returned.
            sizes: Of the part of each rank, in their order; the same on all ranks.
            group: Of the ranks; default: all.
        """
        own = sizes[dist.get_rank(group)]
        self._received = tensor.new_empty(len(sizes), own)
        self._work = dist.all_to_all_single(
            self._received.view(-1), tensor, [own] * len(sizes), list(sizes), group=group, async_op=True
        )

    def wait(self) -> Tensor:
        """The sum, in the dtype of the tensor: added up in fp32 (or fp64), and rounded once."""
        self._work.wait()
        first, *others = self._received
        if not others:
            return first
        if len(others) == 1:
            return torch.add(first, others[0], out=first)
        total = first.to(torch.promote_types(first.dtype, torch.float32), copy=True)
        for other in others:
            total += other
        return total.to(first.dtype)


class _Works:
    """Several collectives under way, as one."""

    def __init__(self, works: Sequence[dist.Work]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def use_fast_collectives(backend: Any) -> None:
    """Have DeepSpeed gather and reduce-scatter by the functions of this module.

    Args:
        backend: DeepSpeed's TorchBackend, whose process groups are gloo's.
    """
    if isinstance(backend.all_gather_function, partial):  # of an earlier call
        return
    backend.all_gather_function = partial(all_gather, backend.all_gather_function)
    backend.reduce_scatter_function = partial(reduce_scatter, backend.reduce_scatter_function)


def all_gather(
    original: Callable[..., Any],
    output_tensor: Tensor,
    input_tensor: Tensor,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Any:
    """torch.distributed.all_gather_into_tensor, by a broadcast of each rank's part.

    Args:
        original: torch's, for sizes that do not fit, and for many ranks.
        output_tensor: Of all values, in the order of ranks.
        input_tensor: This rank's; may be a view of its place in the output.
        group: Of the ranks; default: all.
        async_op: Return a handle with `wait`.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if output_tensor.numel() != ranks * input_tensor.numel() or not input_tensor.numel() or ranks > FEW_RANKS:
        return original(output_tensor=output_tensor, input_tensor=input_tensor, group=group, async_op=async_op)
    parts = output_tensor.view(-1).chunk(ranks)
    if parts[rank].data_ptr() != input_tensor.data_ptr():
        parts[rank].copy_(input_tensor.reshape(-1))
    works = _Works([dist.broadcast(part, group=group, group_src=n, async_op=True) for n, part in enumerate(parts)])
    return works if async_op else works.wait()


def reduce_scatter(
    original: Callable[..., Any],
    output_tensor: Tensor,
    input_tensor: Tensor,
    op: Any = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Any:
    """torch.distributed.reduce_scatter_tensor, by an exchange of parts; a sum of bf16 is rounded once.

    Args:
        original: torch's, for whatever is not a sum that is waited for.
        output_tensor: This rank's part of the sum; may be a view of its place in the input.
        input_tensor: Of all values, part by part in the order of ranks.
        op: Of torch.distributed.
        group: Of the ranks; default: all.
        async_op: Return a handle with `wait`.
    """
    ranks, part = dist.get_world_size(group), output_tensor.numel()
    if op != dist.ReduceOp.SUM or async_op or input_tensor.numel() != ranks * part or not part:
        return original(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
    output_tensor.view(-1).copy_(SumOfParts(input_tensor.reshape(-1), [part] * ranks, group).wait())
    return None
