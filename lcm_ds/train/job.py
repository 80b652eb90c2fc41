"""A checked run: its configs, its model and the order of its data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_ds import deepspeed_config
from lcm_ds.config import TrainConfig
from lcm_ds.data.format import Dataset
from lcm_ds.data.plan import Plan
from lcm_ds.errors import Collector
from lcm_ds.model.sizes import Sizes

if TYPE_CHECKING:
    from lcm_ds.train.init_from import InitFrom

MAX_WARMUP_SHARE = 0.2  # of the run's steps


@dataclass(frozen=True)
class ConfiguredRun:
    """A run as its configs describe it."""

    config: TrainConfig
    ds: dict[str, Any]  # the resolved DeepSpeed JSON
    model: Sizes

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self.config.run_dir)

    @property
    def step_concepts(self) -> int:
        """Concepts of an optimizer step, over all ranks."""
        return self.config.batch.rows_per_step * self.config.data.row_length

    @property
    def total_steps(self) -> int | None:
        """Steps of the complete run; None if unknown."""
        return self.config.steps

    @property
    def epochs(self) -> float | None:
        """How often the complete run reads its data; None if unknown."""
        return None

    @property
    def concepts(self) -> int | None:
        """Concepts that the complete run reads; None if unknown."""
        return None if self.total_steps is None else self.total_steps * self.step_concepts

    def length(self) -> str:
        """The length of the run, for display: concepts, epochs and warm-up; if its steps are known."""
        epochs = "" if self.epochs is None else f", {self.epochs:.2f} epochs"
        warmup = self.config.optim.schedule.warmup_steps
        share = "" if self.total_steps is None else f", {warmup / self.total_steps:.1%} of the run"
        return f"{self.concepts or 0:,} concepts{epochs}; warm-up {warmup:,} steps{share}"

    def warmup_warning(self) -> str | None:
        """A warning if the warm-up takes a larger share of the run than in any recipe."""
        steps, warmup = self.total_steps, self.config.optim.schedule.warmup_steps
        if steps is None or warmup / steps <= MAX_WARMUP_SHARE:
            return None
        return (
            f"optim.schedule.warmup_steps: {warmup} is {warmup / steps:.0%} of the "
            f"run's {steps} steps; the LCM paper's 4 % would be {max(1, steps // 25)}"
        )

    def check_device(self) -> None:
        """Check that this machine's device, which trains, can do what the run wants.

        Raises InputError with a line for each thing that it cannot.
        """
        from lcm_ds.model.float8 import CAPABILITY, device_without_float8

        errors = Collector()
        with errors:
            deepspeed = self.config.deepspeed
            deepspeed_config.check_device(self.ds, deepspeed if isinstance(deepspeed, str) else "deepspeed")
        if self.config.train.precision == "fp8" and (device := device_without_float8()):
            needed = ".".join(map(str, CAPABILITY))
            errors.errors.append(
                f"train.precision: fp8 needs NVIDIA GPUs of compute capability {needed} or higher (Ada, Hopper, "
                f"Blackwell), not {device}; remove the key to train in bf16"
            )
        errors.raise_if_any()


@dataclass(frozen=True)
class Outline(ConfiguredRun):
    """A run whose data is not there yet, or whose number of concepts was given instead."""

    missing: tuple[str, ...] = ()  # the datasets that are not there
    epoch_concepts: int | None = None  # given; None: unknown

    @property
    def total_steps(self) -> int | None:
        """`steps`, those of `epochs`, or the smaller of both."""
        ends = [] if self.config.steps is None else [self.config.steps]
        if self.config.epochs is not None and self.epoch_concepts is not None:
            ends.append(-(-self.config.epochs * self.epoch_concepts // self.step_concepts))
        return min(ends, default=None)

    @property
    def concepts(self) -> int | None:
        """Those of its steps, or of its epochs if they are fewer, as the last row is not full."""
        ends = [] if self.total_steps is None else [self.total_steps * self.step_concepts]
        if self.config.epochs is not None and self.epoch_concepts is not None:
            ends.append(self.config.epochs * self.epoch_concepts)
        return min(ends, default=None)

    @property
    def epochs(self) -> float | None:
        """The concepts that it reads by those of an epoch."""
        if self.epoch_concepts is None or self.concepts is None:
            return None
        return self.concepts / self.epoch_concepts


@dataclass(frozen=True)
class TrainJob(ConfiguredRun):
    """A checked run (job_builder.py)."""

    datasets: list[Dataset]
    validation: Dataset | None
    plan: Plan
    fingerprint: str
    initial: InitFrom | None = None  # origin of the initial weights; None: random, or the run's own checkpoint

    @property
    def total_steps(self) -> int:
        """`steps`, those of `epochs`, or the smaller of both."""
        return min(end for end in (self.config.steps, self.plan.steps) if end is not None)

    @property
    def epochs(self) -> float:
        """By the plan."""
        return self.plan.epoch(self.total_steps)

    @property
    def concepts(self) -> int:
        """By the plan."""
        return self.plan.concepts(self.total_steps)
