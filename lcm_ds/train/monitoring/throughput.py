"""Throughput of a run: time per step, waiting for data, concepts per second, model FLOPs utilisation, memory."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from typing import Any

import torch

from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.flops import training_flops

# Dense bf16 peak of one device in TFLOP/s, by a part of its name; the first match wins, so longer names come first.
# From the vendors' datasheets, those of B300 from resellers' pages; half of NVIDIA's since Hopper, which assume
# sparsity. GB200 and GB300: one GPU of the two.
PEAK_TFLOPS = {
    "GB300": 2500.0,  # GB300 NVL72: 360 PFLOPS, 72 GPUs
    "B300": 2250.0,  # HGX B300: 36 PFLOPS, 8 GPUs of two dies
    "GB200": 2500.0,  # GB200 NVL72: 360 PFLOPS, 72 GPUs
    "B200": 2250.0,  # HGX B200: 36 PFLOPS, 8 GPUs
    "GH200": 989.0,
    "H200 NVL": 835.5,
    "H200": 989.0,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "MI300X": 1307.0,
}


def peak_tflops(device: torch.device, stated: float | None) -> float | None:
    """The device's peak as stated in the config or the table; None if unknown."""
    if stated is not None or device.type != "cuda":
        return stated
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """The peak of a device that torch calls `name`; None if unknown, as for a part of one (MIG)."""
    if " MIG " in name:
        return None
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


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

    def __init__(self, model: BaseLCMConfig, world_size: int, peak: float | None) -> None:
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
