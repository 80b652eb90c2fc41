"""GPUs whose peak and memory are known, for the utilisation of a run (mfu) and for plans; the price of their hours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lcm_ds.errors import InputError, did_you_mean


class Gpu(NamedTuple):
    """One device, by the vendors' datasheets."""

    part: str  # of the name that torch has for it
    tflops: float  # dense bf16 peak in TFLOP/s, with fp32 sums
    gigabytes: int  # memory, in 10⁹ bytes; of several variants the largest

    @property
    def option(self) -> str:
        """Its name on the command line."""
        return self.part.lower().replace(" ", "-")


# The first match wins, so longer names come first. From the vendors' datasheets, those of B300 from resellers' pages;
# half of NVIDIA's since Hopper, which assume sparsity. GB200 and GB300: one GPU of the two. GeForce: NVIDIA's Ada and
# Ampere GA102 white papers.
GPUS = (
    Gpu("GB300", 2500.0, 279),  # GB300 NVL72: 360 PFLOPS, 72 GPUs
    Gpu("B300", 2250.0, 268),  # HGX B300: 36 PFLOPS, 8 GPUs of two dies
    Gpu("GB200", 2500.0, 186),  # GB200 NVL72: 360 PFLOPS, 72 GPUs
    Gpu("B200", 2250.0, 180),  # HGX B200: 36 PFLOPS, 8 GPUs
    Gpu("GH200", 989.0, 144),
    Gpu("H200 NVL", 835.5, 141),
    Gpu("H200", 989.0, 141),
    Gpu("H100 NVL", 835.5, 94),
    Gpu("H100 PCIe", 756.0, 80),
    Gpu("H100", 989.0, 80),
    Gpu("A100", 312.0, 80),
    Gpu("L40S", 362.0, 48),
    Gpu("RTX 4090", 165.2, 24),
    Gpu("RTX 3090", 71.0, 24),
    Gpu("MI300X", 1307.0, 192),
)


def gpu_of(name: str) -> Gpu | None:
    """The device that torch calls `name`; None if unknown, as for a part of one (MIG)."""
    return None if " MIG " in name else next((gpu for gpu in GPUS if gpu.part in name), None)


def gpu_named(option: str) -> Gpu:
    """The device of an option --gpu, in any case. Raises InputError if it is not in the table."""
    names = {gpu.option: gpu for gpu in GPUS}
    if option.lower() not in names:
        known = f" (known: {', '.join(names)}; log.peak_tflops=X plans for any other)"
        raise InputError(f"--gpu {option}: no such GPU in the table{did_you_mean(option.lower(), names, known)}")
    return names[option.lower()]


@dataclass(frozen=True)
class Prices:
    """What hours and costs are computed for."""

    gpu: Gpu | None = None
    per_gpu_hour: float | None = None

    def errors(self) -> Iterator[str]:
        """What is wrong with them, one line each."""
        if self.per_gpu_hour is not None and self.per_gpu_hour <= 0:
            yield f"--price-per-gpu-hour {self.per_gpu_hour:g}: has to be more than 0"
