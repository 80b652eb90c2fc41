"""Histograms of weights and gradients, in few groups: what fits a chart, whatever the size of the model.

Promises: the same numbers under every ZeRO stage; one parameter at a time is whole on a device, and nothing but counts
leaves it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor, nn

# Edges of bins: powers of RATIO from SMALLEST to LARGEST, of both signs; what is beyond has a bin of its own.
SMALLEST, LARGEST, RATIO = 1e-10, 1e4, 1.2
LAYER_GROUPS = 4  # of a model's layers, at most
KINDS = {"self_attn": "attention", "mlp": "mlp"}  # a decoder layer's matrices, by the module that has them


@dataclass(frozen=True)
class Histogram:
    """Counts of finite values: counts[i] of them lie above limits[i − 1] and at or below limits[i]."""

    limits: list[float]
    counts: list[int]
    min: float
    max: float
    sum: float
    sum_of_squares: float

    @property
    def count(self) -> int:
        """How many values there are."""
        return sum(self.counts)


def histograms(engine: deepspeed.DeepSpeedEngine, counts: bool) -> dict[str, Histogram]:
    """Those of weights and of gradients, by `weights/GROUP` and `gradients/GROUP`; all ranks call this together.

    To be called between the last backward of a step and engine.step: then gradients are there, averaged over ranks and
    not yet clipped. counts: whether this rank wants them; the others only help to put the parameters together.
    """
    found: dict[str, _Counts] = {}
    scale = float(getattr(engine.optimizer, "cur_scale", 1.0))  # fp16 multiplies the loss by it
    for name, parameter in engine.module.named_parameters():
        group = group_of(name, engine.module.config.num_hidden_layers)
        for what, values in _whole(parameter):
            if counts and values is not None:
                exact = values.detach().float() / (scale if what == "gradients" else 1.0)
                found.setdefault(f"{what}/{group}", _Counts(exact.device)).add(exact)
    return {name: some.read() for name, some in found.items() if some.any()}


def group_of(name: str, layers: int) -> str:
    """The group that a parameter of a Base-LCM of so many layers belongs to."""
    parts = name.split(".")
    if parts[0] != "layers":
        return "norms" if parts[0] == "norm" else parts[0]
    kind = "norms" if "layernorm" in parts[2] else "biases" if parts[-1] == "bias" else KINDS[parts[2]]
    size = -(-layers // LAYER_GROUPS)
    first = int(parts[1]) // size * size
    last = min(first + size, layers) - 1
    return f"{kind}/layer_{first:02d}" + (f"-{last:02d}" if last > first else "")


def _whole(parameter: nn.Parameter) -> Iterator[tuple[str, Tensor | None]]:
    """A parameter and its gradient, put together from all ranks, the weights in fp32 where there are such."""
    weights = safe_get_full_fp32_param(parameter)
    yield "weights", parameter if weights is None else weights
    yield "gradients", safe_get_full_grad(parameter)


@cache
def _edges() -> Tensor:
    """Ascending, fp32."""
    steps = torch.arange(0, 1 + int(torch.log(torch.tensor(LARGEST / SMALLEST)) / torch.log(torch.tensor(RATIO))))
    sizes = (SMALLEST * torch.tensor(RATIO, dtype=torch.float64) ** steps).float()
    return torch.cat([-sizes.flip(0), sizes])


class _Counts:
    """A histogram in the making, on a device."""

    def __init__(self, device: torch.device) -> None:
        self._edges = _edges().to(device)
        self._counts = torch.zeros(len(self._edges) + 1, dtype=torch.int64, device=device)
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._min = torch.full((), torch.inf, device=device)
        self._max = -self._min

    def add(self, values: Tensor) -> None:
        """Count the finite ones of some values."""
        finite = values.flatten()
        finite = finite[finite.isfinite()]
        if not len(finite):
            return
        bins = torch.bucketize(finite, self._edges, out_int32=True)
        self._counts += torch.bincount(bins, minlength=len(self._counts))
        self._sums += torch.stack([finite.sum(dtype=torch.float64), finite.square().sum(dtype=torch.float64)])
        self._min, self._max = torch.minimum(self._min, finite.min()), torch.maximum(self._max, finite.max())

    def any(self) -> bool:
        """Whether anything was counted."""
        return bool(self._counts.any())

    def read(self) -> Histogram:
        """What was counted, without the empty bins at both ends."""
        counts = self._counts.tolist()
        limits = [*self._edges.tolist(), max(LARGEST, self._max.item())]
        filled = [number for number, count in enumerate(counts) if count]
        part = slice(max(0, filled[0] - 1), filled[-1] + 1)  # an empty one, whose limit is the left end of the first
        least, most = self._min.item(), self._max.item()
        return Histogram(limits[part], counts[part], least, most, *self._sums.tolist())
