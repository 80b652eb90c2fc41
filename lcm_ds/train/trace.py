"""`lcm-ds trace`: the documents that a step sees, found by arithmetic without training to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lcm_ds.config import TrainConfig, load
from lcm_ds.data.format import open_dataset
from lcm_ds.data.loader import TraceLine
from lcm_ds.data.loader import trace as trace_step
from lcm_ds.errors import Collector, InputError
from lcm_ds.train.check import plan_of


def trace(run: str | Path, overrides: Sequence[str], step: int) -> list[TraceLine]:
    """Print a line a segment of step `step` (from 0): lane, shard, key, concepts, id, first words; and return them.

    run: a run folder, or a train config. Raises InputError where there is neither, or the run has no such step.
    """
    config = load(TrainConfig, Path(run) / "config.yaml" if Path(run).is_dir() else Path(run), overrides)
    mistakes = Collector()
    datasets = []
    for entry in config.data.train:
        with mistakes:
            datasets.append(open_dataset(entry.path, config.data.cache_dir))
    mistakes.raise_if_any()
    plan, _ = plan_of(config, datasets)
    ends = [end for end in (config.steps, plan.steps) if end is not None]
    if not 0 <= step < min(ends):
        raise InputError(f"--step {step}: this run has steps 0 to {min(ends) - 1}")
    lines = trace_step(datasets, plan, config.data.max_segment, step)
    for line in lines:
        print(
            f"lane {line.lane:>3}  {line.shard} {line.key}  concepts {line.start}-{line.stop}  {line.id}  {line.words}"
        )
    return lines
