"""Throughput of a run: time per step, waiting for data, concepts per second, model FLOPs utilisation, memory."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from typing import Any

import torch

from lcm_ds.devices import gpu_of
from lcm_ds.model.flops import training_flops
from lcm_ds.model.sizes import Sizes


def peak_tflops(device: torch.device, stated: float | None) -> float | None:
    """The device's peak as stated in the config or the table; None if unknown."""
    if stated is not None or device.type != "cuda":
        return stated
    gpu = gpu_of(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.tflops


def memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: of the allocator on a GPU, of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@dataclass
class _Totals:
    """Sums over steps."""

    seconds: float = 0.0
    steps: int = 0
    concepts: int = 0
    attended_pairs: int = 0
    waited: float = 0.0


class ThroughputMeter:
    """Sums over the steps since the last report, and over all steps."""

    def __init__(self, model: Sizes, world_size: int, peak: float | None) -> None:
        self._model = model
        self._peak_flops = None if peak is None else peak * 1e12 * world_size
        self._overall = _Totals()
        self.reset()

    def reset(self) -> None:
        """Start over; also after a validation or a save, which are not counted."""
        self._since = time.perf_counter()
        self._recent = _Totals()

    def add(self, concepts: int, attended_pairs: int, waited: float) -> None:
        """Count a step.

        Args:
            concepts: Real ones, over all ranks.
            attended_pairs: See `training_flops`; over all ranks.
            waited: Seconds that this rank waited for data.
        """
        now = time.perf_counter()
        for totals in (self._recent, self._overall):
            totals.seconds += now - self._since
            totals.steps += 1
            totals.concepts += concepts
            totals.attended_pairs += attended_pairs
            totals.waited += waited
        self._since = now

    def read(self, overall: bool = False) -> dict[str, Any]:
        """step_time and data_wait in seconds per step, concepts_per_second over all ranks, mfu (None: peak unknown).

        overall: of all steps, not only of those since the last `reset`.
        """
        totals = self._overall if overall else self._recent
        seconds, steps = max(totals.seconds, 1e-9), max(1, totals.steps)
        flops = training_flops(self._model, totals.concepts, totals.attended_pairs)
        return {
            "concepts_per_second": totals.concepts / seconds,
            "mfu": None if self._peak_flops is None else flops / seconds / self._peak_flops,
            "data_wait": totals.waited / steps,
            "step_time": seconds / steps,
        }
