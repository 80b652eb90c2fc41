"""A run that has passed its checks: its configs, its model and the order in which it reads its data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcm_ds.config import TrainConfig
from lcm_ds.data.format import Dataset
from lcm_ds.data.plan import Plan
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.train.init_from import InitFrom

LONG_WARMUP = 0.2  # of the run's steps


@dataclass(frozen=True)
class TrainJob:
    """A run that has passed its checks."""

    config: TrainConfig
    ds: dict[str, Any]  # the DeepSpeed JSON, every "auto" filled in
    model: BaseLCMConfig
    datasets: list[Dataset]
    validation: Dataset | None
    plan: Plan
    fingerprint: str
    initial: InitFrom | None = None  # where its first weights are from; None: they are fresh, or its own checkpoint's

    @property
    def run_dir(self) -> Path:
        """Where the run lives."""
        return Path(self.config.run_dir)

    @property
    def total_steps(self) -> int:
        """Steps until the run is done: `steps`, the end of `epochs`, or the sooner of both."""
        ends = [end for end in (self.config.steps, self.plan.steps) if end is not None]
        return min(ends)

    @property
    def warmup_share(self) -> float:
        """The share of the run's steps that the learning rate rises for."""
        return self.config.optim.schedule.warmup_steps / self.total_steps

    def length(self) -> str:
        """How long the run is, for people: concepts and epochs in all, and what of it is warm-up."""
        concepts, epochs = self.plan.concepts(self.total_steps), self.plan.epoch(self.total_steps)
        warmup = self.config.optim.schedule.warmup_steps
        return (
            f"{concepts:,} concepts, {epochs:.2f} epochs; warm-up {warmup:,} steps, {self.warmup_share:.1%} of the run"
        )

    def warmup_warning(self) -> str | None:
        """A warning, if the warm-up takes more of the run than any recipe would."""
        if self.warmup_share <= LONG_WARMUP:
            return None
        return (
            f"optim.schedule.warmup_steps: {self.config.optim.schedule.warmup_steps} is {self.warmup_share:.0%} of the "
            f"run's {self.total_steps} steps; the LCM paper's 4 % would be {max(1, self.total_steps // 25)}"
        )
