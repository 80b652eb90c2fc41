"""How fast a run goes: time per step, waiting for data, concepts a second, model FLOPs utilisation, memory."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch

from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.flops import training_flops

# Dense bf16 peak of one device in TFLOP/s, from the vendors' datasheets (without sparsity). First match wins.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "GH200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "MI300X": 1307.0,
}


def peak_tflops(device: torch.device, stated: float | None) -> float | None:
    """The device's peak as stated in the config or found in the table; None where it is unknown."""
    if stated is not None or device.type != "cuda":
        return stated
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def memory_gib(device: torch.device) -> float:
    """The most memory held so far in GiB: the allocator's on a GPU, resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class SpeedMeter:
    """Adds up steps between two logged lines."""

    def __init__(self, model: BaseLCMConfig, world_size: int, peak: float | None) -> None:
        self._model = model
        self._peak_flops = None if peak is None else peak * 1e12 * world_size
        self.reset()

    def reset(self) -> None:
        """Start anew, also after what is not training (a validation, a save)."""
        self._started = time.perf_counter()
        self._steps = self._concepts = self._pairs = 0
        self._waited = 0.0

    def add(self, concepts: int, pairs: int, waited: float) -> None:
        """One step: its real concepts and their pairs (see `training_flops`), over all ranks; this rank's wait (s)."""
        self._steps += 1
        self._concepts += concepts
        self._pairs += pairs
        self._waited += waited

    def read(self) -> dict[str, Any]:
        """step_time and data_wait in seconds a step, concepts_per_second over all ranks, mfu (None: peak unknown)."""
        seconds = time.perf_counter() - self._started
        steps = max(1, self._steps)
        flops = training_flops(self._model, self._concepts, self._pairs)
        return {
            "concepts_per_second": self._concepts / seconds,
            "mfu": None if self._peak_flops is None else flops / seconds / self._peak_flops,
            "data_wait": self._waited / steps,
            "step_time": seconds / steps,
        }
