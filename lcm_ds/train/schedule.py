"""Learning rate as a pure function of the step: a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from lcm_ds.config import ScheduleConfig


def learning_rate_factor(step: int, total_steps: int | None, schedule: ScheduleConfig) -> float:
    """The factor of `optim.lr` at a step.

    Linear warm-up over `warmup_steps`, then

    - cosine: half a cosine from 1 to `final` at the last step (Loshchilov and Hutter 2017, without restarts);
    - wsd: 1 until `decay_steps` before the end, then linear to `final` (Hu et al. 2024, MiniCPM);
    - constant: 1.

    Args:
        step: From 0.
        total_steps: Of the run; None if unknown, which only constant allows.
        schedule: The config.

    Raises:
        ValueError: `total_steps` is needed and None.
    """

    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    if schedule.name == "constant":
        return 1.0
    if total_steps is None:
        raise ValueError(f"schedule {schedule.name} needs the number of steps")
    if schedule.name == "wsd":
        decay = schedule.decay_steps if schedule.decay_steps is not None else max(1, total_steps // 10)
        start = max(schedule.warmup_steps, total_steps - decay)
    else:
        start = schedule.warmup_steps
    progress = min(1.0, (step - start) / max(1, total_steps - 1 - start)) if step > start else 0.0
    if schedule.name == "wsd":
        return 1.0 - (1.0 - schedule.final) * progress
    return schedule.final + (1.0 - schedule.final) * 0.5 * (1.0 + math.cos(math.pi * progress))
