"""Histograms of weights and gradients in a few groups, whose number does not grow with the model.

The same numbers under every ZeRO stage. One parameter at a time is gathered on a device, which only counts leave.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor, nn

# Bin edges: ± powers of RATIO from SMALLEST to LARGEST; one more bin for larger values.
SMALLEST, LARGEST, RATIO = 1e-10, 1e4, 1.2
LAYER_GROUPS = 4  # at most
KINDS = {"self_attn": "attention", "mlp": "mlp"}  # module of a decoder layer → group


@dataclass(frozen=True)
class Histogram:
    """Counts of finite values: counts[i] is the number in (limits[i − 1], limits[i]]."""

    limits: list[float]
    counts: list[int]
    min: float
    max: float
    sum: float
    sum_of_squares: float

    @property
    def count(self) -> int:
        """Number of values."""
        return sum(self.counts)


def histograms(engine: deepspeed.DeepSpeedEngine, counts: bool) -> dict[str, Histogram]:
    """Histograms named `weights/GROUP` and `gradients/GROUP`; all ranks call this together.

    To be called between the last backward of a step and engine.step, when gradients are averaged over ranks and not yet
    clipped. counts: whether this rank returns histograms; the others only take part in gathering parameters.
    """
    groups: dict[str, _Counts] = {}
    scale = float(getattr(engine.optimizer, "cur_scale", 1.0))  # the loss scale of fp16
    for name, parameter in engine.module.named_parameters():
        group = group_of(name, engine.module.config.num_hidden_layers)
        for kind, values in _gathered(parameter):
            if counts and values is not None:
                unscaled = values.detach().float() / (scale if kind == "gradients" else 1.0)
                groups.setdefault(f"{kind}/{group}", _Counts(unscaled.device)).add(unscaled)
    return {name: group_counts.read() for name, group_counts in groups.items() if group_counts.any()}


def group_of(name: str, layers: int) -> str:
    """The group of a parameter of a Base-LCM with `layers` layers."""
    parts = name.split(".")
    if parts[0] != "layers":
        return "norms" if parts[0] == "norm" else parts[0]
    kind = "norms" if "layernorm" in parts[2] else "biases" if parts[-1] == "bias" else KINDS[parts[2]]
    size = -(-layers // LAYER_GROUPS)
    first = int(parts[1]) // size * size
    last = min(first + size, layers) - 1
    return f"{kind}/layer_{first:02d}" + (f"-{last:02d}" if last > first else "")


def _gathered(parameter: nn.Parameter) -> Iterator[tuple[str, Tensor | None]]:
    """A parameter (its fp32 master if there is one) and its gradient, gathered from all ranks."""
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
    """Accumulates a histogram on a device."""

    def __init__(self, device: torch.device) -> None:
        self._edges = _edges().to(device)
        self._counts = torch.zeros(len(self._edges) + 1, dtype=torch.int64, device=device)
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._min = torch.full((), torch.inf, device=device)
        self._max = -self._min

    def add(self, values: Tensor) -> None:
        """Count the finite values."""
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
        """The histogram without empty bins at its ends, but one on the left, whose limit the first full bin needs."""
        counts = self._counts.tolist()
        limits = [*self._edges.tolist(), max(LARGEST, self._max.item())]
        filled = [index for index, count in enumerate(counts) if count]
        part = slice(max(0, filled[0] - 1), filled[-1] + 1)
        return Histogram(limits[part], counts[part], self._min.item(), self._max.item(), *self._sums.tolist())
