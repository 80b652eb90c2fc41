"""The text of a run's console lines, in aligned columns: steps, validations, the progress bar, the summary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcm_ds.metrics import LOGGED

BAR_WIDTH = 30  # characters
BASELINES = ("val_loss_of_mean", "val_loss_of_copy", "val_loss_of_ridge")


def step_line(done: int, total: int, values: Mapping[str, Any]) -> str:
    """The line of a logged step, with its metrics."""
    norm, mfu = values["grad_norm"], values["mfu"]
    return (
        f"{_step(done, total)}  loss {_format(values['loss'])}  lr {values['lr']:.2e}"
        f"  grad norm {math.nan if norm is None else norm:8.3f}  {values['concepts_per_second']:9,.0f} concepts/s"
        f"{'' if mfu is None else f'  mfu {mfu:5.1%}'}  eta {clock((total - done) * values['step_time']):>8}"
    )


def validation_line(done: int, total: int, values: Mapping[str, Any]) -> str:
    """The line of a validation after `done` steps."""
    baselines = "".join(f"  {LOGGED[key].label} {values[key]:.4f}" for key in BASELINES if values.get(key) is not None)
    return (
        f"{_step(done, total)}  validation loss {_format(values['val_loss'])}{baselines}"
        f"  cosine {_format(values['val_cosine'], 6)}"
    )


def progress_bar(done: int, total: int, seconds: float | None, doing: str = "") -> str:
    """The progress bar of a run.

    Args:
        done: Steps done.
        total: Steps of the run.
        seconds: Until its end; None if not known yet.
        doing: What the run does now, if it is not a step.
    """
    filled = round(BAR_WIDTH * done / total)
    left = "" if seconds is None else f"  {clock(seconds)} left"
    return f"{'━' * filled}{'╌' * (BAR_WIDTH - filled)} {done:,} of {total:,} steps ({done / total:.0%}){left}  {doing}"


def summary(run_dir: Path, speed: Mapping[str, Any], seconds: float, losses: Mapping[int, float]) -> list[str]:
    """The last lines of a finished run.

    Args:
        run_dir: Of the run.
        speed: Of `ThroughputMeter.read`.
        seconds: Since its last start.
        losses: Of all validations, by step.
    """
    mfu = "" if speed["mfu"] is None else f", mfu {speed['mfu']:.1%}"
    lines = [
        f"time        {clock(seconds)} since the last start",
        f"speed       {speed['concepts_per_second']:,.0f} concepts/s{mfu}, without validating and saving",
    ]
    if losses:
        last, best = max(losses), min(losses, key=lambda step: losses[step])
        lines.append(f"validation  loss {losses[last]:.4f} at step {last}; best {losses[best]:.4f} at step {best}")
    return [
        f"  {line}"
        for line in (
            *lines,
            f"next        lcm-ds evaluate {run_dir}",
            f"            lcm-ds generate {run_dir} --prompt TEXT",
            f"            tensorboard --logdir {run_dir / 'tensorboard'}",
        )
    ]


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _format(value: float | None, width: int = 7) -> str:
    """The value, or a dash if there were no targets."""
    return f"{'–':>{width}}" if value is None else f"{value:{width}.4f}"


def _step(done: int, total: int) -> str:
    return f"step {done:>{len(str(total))}}/{total}"
