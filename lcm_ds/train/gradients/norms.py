"""DeepSpeed's gradient norms and overflow checks with a few kernels a step.

DeepSpeed 0.19 starts up to eleven kernels for each gradient, and waits for the device once for the norm, the clipping
and each parameter group (with offload or under ZeRO 0 once for each gradient). Here the norms of all gradients of a
group are computed together, and DeepSpeed is given the vector of these norms in place of the gradients: its norm is the
same. With a BF16_Optimizer each rank computes that of its partition. The host waits for the norm, by which it decides
whether to skip the step, and in fp16 for the overflow check. What ranks exchange and when a step is skipped stays
DeepSpeed's. Parts that DeepSpeed has renamed are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import bf16_optimizer, utils
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.runtime.zero.utils import get_norm_dtype
from torch import Tensor

PART = 1 << 16  # values of fp32 whose squares are added up in fp32, on a CPU


def fuse_norms(optimizer: Any) -> None:
    """Have one of DeepSpeed's optimizers compute norms and overflow checks over lists of gradients."""
    _replace(bf16_optimizer, "get_global_norm_of_tensors", _global_norm)
    _replace(bf16_optimizer, "clip_tensors_by_global_norm", _clip)
    for module in (utils, stage_1_and_2, stage3):
        _replace(module, "mask_nan_or_inf_with_val_inplace", _mask_nonfinite)
    for module in (stage_1_and_2, stage3):
        _replace(module, "combine_grad_norm_groups", _combined)
    if isinstance(optimizer, bf16_optimizer.BF16_Optimizer) and not optimizer.has_moe_layers and optimizer.mpu is None:
        _replace(optimizer, "get_grads_for_norm", partial(_of_partition, optimizer))
    known: dict[int, Tensor] = {}  # of the overflow check: id of a group's list of gradients → their norms
    if isinstance(optimizer, stage_1_and_2.DeepSpeedZeroOptimizer | stage3.DeepSpeedZeroOptimizer_Stage3):
        _replace(optimizer, "get_grad_norm_direct", partial(_norm_of_group, known))
        _replace(optimizer, "complete_grad_norm_calculation_for_cpu_offload", partial(_norm_with_offload, optimizer))
    if isinstance(optimizer, stage_1_and_2.DeepSpeedZeroOptimizer):
        _replace(optimizer, "has_overflow_partitioned_grads_serial", partial(_overflow, known, optimizer))
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        _replace(optimizer.overflow_checker, "has_overflow_serial", _overflow_of_parameters)


def _replace(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Have `function` called in place of owner.name, with the original as its first argument."""
    original = getattr(owner, name, None)
    if original is not None and not isinstance(original, partial):  # a partial: replaced for an earlier engine
        setattr(owner, name, partial(function, original))


def _norms(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """The 2-norm of each tensor, computed in `dtype` (default: their own): [len(tensors)].

    On CPUs torch adds up the squares of fp32 in fp32, one after the other: of 30 million values the norm lacks a
    thousandth (findings/torch-norms-of-many-values-on-cpus.sh), and in fp64 it takes longer. There the norms of
    parts are added up in fp64.
    """
    if not tensors or tensors[0].device.type != "cpu" or tensors[0].dtype != torch.float32:
        return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=dtype))
    parts = [tensor.reshape(-1).split(PART) for tensor in tensors]
    squares = torch.stack(torch._foreach_norm([part for each in parts for part in each], 2)).double().square_()
    first = list(accumulate(map(len, parts[:-1]), initial=0))
    return torch.from_numpy(np.add.reduceat(squares.numpy(), first)).sqrt_().to(dtype or torch.float32)


def _mask_nonfinite(original: Any, norm: Tensor, device: Any = None, val: float = -1.0) -> None:
    """In place, without a value that has to be copied to the device first."""
    norm.masked_fill_(~norm.isfinite(), val)


# --- BF16_Optimizer ---------------------------------------------------------------------------------------------------


def _global_norm(original: Any, input_tensors: Sequence[Tensor], norm_type: float = 2, **more: Any) -> Tensor:
    tensors = [_norms(input_tensors, torch.float32)] if norm_type == 2 and input_tensors else input_tensors
    norm: Tensor = original(input_tensors=tensors, norm_type=norm_type, **more)
    return norm.cpu()  # the host decides by it whether to skip the step, and whether to clip


def _clip(
    original: Any, input_tensors: Sequence[Tensor], max_norm: float, global_norm: Tensor, eps: float = 1e-6, **more: Any
) -> Tensor:
    coefficient = float(max_norm / (global_norm + eps))
    if coefficient < 1:
        torch._foreach_mul_(list(input_tensors), coefficient)
    return global_norm


def _of_partition(optimizer: Any, original: Any, for_clipping: bool = False) -> Any:
    """What the optimizer of this rank reads, for clipping; else the norm over all ranks, in place of all gradients.

    With Muon, which reads complete matrices, nothing is clipped (deepspeed_config/resolver.py).
    """
    del original
    gradients = optimizer.fp32_groups_gradient_flat_partition
    if for_clipping:
        return gradients
    squares = _norms(gradients, torch.float32).double().square_().sum()
    dist.all_reduce(squares, group=optimizer.dp_process_group)
    return [squares.sqrt_().float()], {}


# --- ZeRO -------------------------------------------------------------------------------------------------------------


def _combined(original: Any, norm_groups: Sequence[Any], **more: Any) -> Tensor:
    norm: Tensor = original(norm_groups, **more)
    return norm.cpu()  # the host decides by it whether to skip the step, and computes from it how to clip


def _norm_of_group(
    known: dict[int, Tensor], original: Any, gradients: Sequence[Tensor], params: Sequence[Any], norm_type: float = 2
) -> Any:
    norms = known.pop(id(gradients), None)
    real = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    if norm_type != 2 or not real:
        return original(gradients, params, norm_type)
    return original([_norms(real, get_norm_dtype()) if norms is None else norms], params[:1], norm_type)


def _norm_with_offload(optimizer: Any, original: Any, params: Sequence[Any]) -> Any:
    by_parameter = optimizer.norm_for_param_grads
    on_device = [key for key, norm in by_parameter.items() if norm.device.type != "cpu"]
    if on_device:
        by_parameter.update(zip(on_device, torch.stack([by_parameter[key] for key in on_device]).cpu(), strict=True))
    return original(params)


def _overflow(known: dict[int, Tensor], optimizer: Any, original: Any) -> Tensor:
    """The norm of the same step takes the norms from here; padding is zero."""
    del original
    known.clear()
    for group in range(len(optimizer.bit16_groups)):
        gradients = optimizer.averaged_gradients[group]
        if present := [gradient for gradient in gradients if gradient is not None]:
            known[id(gradients)] = _norms(present, get_norm_dtype())
    return _any_nonfinite(list(known.values()))


# --- ZeRO 0 in half precision -----------------------------------------------------------------------------------------


def _overflow_of_parameters(original: Any, params: Sequence[Any]) -> bool:
    del original
    gradients = [parameter.grad for parameter in params if parameter.grad is not None]
    return bool(_any_nonfinite([_norms(gradients, get_norm_dtype())] if gradients else []))


def _any_nonfinite(norms: Sequence[Tensor]) -> Tensor:
    """bool [1], on the device; no norm in fp64 overflows, and on CPUs none of values below 1e16.

    Args:
        norms: Of all gradients, [gradients of a group] each.
    """
    if not norms:  # of a rank without parameters
        return torch.zeros(1, dtype=torch.bool, device=get_accelerator().current_device_name())
    return ~torch.cat(list(norms)).isfinite().all(dim=0, keepdim=True)
