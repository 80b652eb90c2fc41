"""How fast a run goes: time per step, waiting for data, concepts a second, model FLOPs utilisation, memory."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from typing import Any

import torch

from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.flops import training_flops

# Dense bf16 peak of one device in TFLOP/s, by what its name holds; the first match wins: longer names come first. From
# the vendors' datasheets; NVIDIA's since Hopper are with sparsity, twice as much. A GB200 has two GPUs: one's peak.
PEAK_TFLOPS = {
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
    """The device's peak as stated in the config or found in the table; None where it is unknown."""
    if stated is not None or device.type != "cuda":
        return stated
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """The peak of a device that torch calls `name`; None where it is unknown, as that of a part of one (MIG) is."""
    if " MIG " in name:
        return None
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def memory_gib(device: torch.device) -> float:
    """The most memory held so far in GiB: the allocator's on a GPU, resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@dataclass
class _Tally:
    """Steps, the seconds they took, and what was in them."""

    seconds: float = 0.0
    steps: int = 0
    concepts: int = 0
    attended_pairs: int = 0
    waited: float = 0.0


class ThroughputMeter:
    """Adds up steps between two logged lines, and all of them."""

    def __init__(self, model: BaseLCMConfig, world_size: int, peak: float | None) -> None:
        self._model = model
        self._peak_flops = None if peak is None else peak * 1e12 * world_size
        self._all = _Tally()
        self.reset()

    def reset(self) -> None:
        """Start anew, also after what is not training (a validation, a save)."""
        self._since = time.perf_counter()
        self._lately = _Tally()

    def add(self, concepts: int, attended_pairs: int, waited: float) -> None:
        """One step: its real concepts and their pairs (see `training_flops`), over all ranks; this rank's wait (s)."""
        now = time.perf_counter()
        for tally in (self._lately, self._all):
            tally.seconds += now - self._since
            tally.steps += 1
            tally.concepts += concepts
            tally.attended_pairs += attended_pairs
            tally.waited += waited
        self._since = now

    def read(self, overall: bool = False) -> dict[str, Any]:
        """step_time and data_wait in seconds a step, concepts_per_second over all ranks, mfu (None: peak unknown).

        overall: of all steps, not only of those since the last `reset`.
        """
        tally = self._all if overall else self._lately
        seconds, steps = max(tally.seconds, 1e-9), max(1, tally.steps)
        flops = training_flops(self._model, tally.concepts, tally.attended_pairs)
        return {
            "concepts_per_second": tally.concepts / seconds,
            "mfu": None if self._peak_flops is None else flops / seconds / self._peak_flops,
            "data_wait": tally.waited / steps,
            "step_time": seconds / steps,
        }
