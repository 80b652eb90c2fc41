"""A checked run: its configs, its model and the order of its data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcm_ds import deepspeed_config
from lcm_ds.config import TrainConfig
from lcm_ds.data.format import Dataset
from lcm_ds.data.plan import Plan
from lcm_ds.errors import Collector
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.float8 import CAPABILITY, device_without_float8
from lcm_ds.train.init_from import InitFrom

MAX_WARMUP_SHARE = 0.2  # of the run's steps


@dataclass(frozen=True)
class TrainJob:
    """A checked run (job_builder.py)."""

    config: TrainConfig
    ds: dict[str, Any]  # the resolved DeepSpeed JSON
    model: BaseLCMConfig
    datasets: list[Dataset]
    validation: Dataset | None
    plan: Plan
    fingerprint: str
    initial: InitFrom | None = None  # origin of the initial weights; None: random, or the run's own checkpoint

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self.config.run_dir)

    @property
    def total_steps(self) -> int:
        """Steps of the complete run: `steps`, those of `epochs`, or the smaller of both."""
        return min(end for end in (self.config.steps, self.plan.steps) if end is not None)

    @property
    def warmup_share(self) -> float:
        """The share of warm-up in the run's steps."""
        return self.config.optim.schedule.warmup_steps / self.total_steps

    def check_device(self, origin: str | Path) -> None:
        """Check that this machine's device, which trains, can do what the run wants.

        origin: For messages. Raises InputError with a line for each thing that it cannot.
        """
        errors = Collector()
        with errors:
            deepspeed_config.check_device(self.ds, origin)
        if self.config.train.precision == "fp8" and (device := device_without_float8()):
            needed = ".".join(map(str, CAPABILITY))
            errors.errors.append(
                f"train.precision: fp8 needs NVIDIA GPUs of compute capability {needed} or higher (Ada, Hopper, "
                f"Blackwell), not {device}; remove the key to train in bf16"
            )
        errors.raise_if_any()

    def length(self) -> str:
        """The length of the run, for display: concepts, epochs and warm-up."""
        concepts, epochs = self.plan.concepts(self.total_steps), self.plan.epoch(self.total_steps)
        warmup = self.config.optim.schedule.warmup_steps
        return (
            f"{concepts:,} concepts, {epochs:.2f} epochs; warm-up {warmup:,} steps, {self.warmup_share:.1%} of the run"
        )

    def warmup_warning(self) -> str | None:
        """A warning if the warm-up takes a larger share of the run than in any recipe."""
        if self.warmup_share <= MAX_WARMUP_SHARE:
            return None
        return (
            f"optim.schedule.warmup_steps: {self.config.optim.schedule.warmup_steps} is {self.warmup_share:.0%} of the "
            f"run's {self.total_steps} steps; the LCM paper's 4 % would be {max(1, self.total_steps // 25)}"
        )
