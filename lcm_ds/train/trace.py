"""`lcm-ds trace`: the documents of a training step, by arithmetic, without training up to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lcm_ds.checkpoint.format import list_checkpoints, load_run_config
from lcm_ds.config import TrainConfig, load
from lcm_ds.data.index.first_use import open_for_run
from lcm_ds.data.trace import TraceLine
from lcm_ds.data.trace import trace as trace_steps
from lcm_ds.errors import Collector, InputError
from lcm_ds.terminal import strip_control_chars
from lcm_ds.train.job_builder import plan_of
from lcm_ds.train.monitoring.metrics_log import read_losses

FIRST_WORDS = 8


def trace(
    run: str | Path, overrides: Sequence[str], first: int, last: int | None = None, text: bool = False
) -> list[list[TraceLine]]:
    """Print and return the segments of some steps, a line each, without verifying checksums.

    Args:
        run: A run folder or a train config.
        overrides: `key=value` with dotted keys.
        first: The first step, from 0.
        last: The last step; default: `first`.
        text: Print the sentences of each segment as well.

    Raises:
        InputError: There is no such run, config or step, or the run was trained in another order.
    """
    is_run = Path(run).is_dir()
    if is_run and not (Path(run) / "config.yaml").is_file():
        raise InputError(f"{run}: no run here (config.yaml is missing)")
    config = load_run_config(run, overrides) if is_run else load(TrainConfig, run, overrides)
    errors = Collector()
    datasets = []
    for entry in config.data.train:
        with errors:
            datasets.append(replace(open_for_run(entry.path, config.data), checksums=False))
    errors.raise_if_any()
    plan, order = plan_of(config, datasets)
    saved = list_checkpoints(Path(run)) if is_run else []
    if saved and saved[-1].state()["fingerprint"] != order:
        raise InputError(
            f"{run}: its checkpoint of step {saved[-1].step} was trained with another data order than datasets, config "
            "and this version of lcm-ds give now: its steps cannot be traced"
        )
    end = min(end for end in (config.steps, plan.steps) if end is not None)
    last = first if last is None else last
    if beyond := [step for step in dict.fromkeys((first, last)) if not 0 <= step < end]:
        raise InputError([f"step {step}: this run has steps 0 to {end - 1}" for step in beyond])
    if last < first:
        raise InputError(f"--range {first} {last}: the last step comes before the first")
    losses = read_losses((Path(run) if is_run else Path(config.run_dir)) / "metrics.jsonl")
    traced = []
    for step, lines in trace_steps(datasets, plan, range(first, last + 1)):
        print(f"step {step}  loss {_format_loss(losses.get(step))}")
        for line in lines:
            _print(line, text, with_dataset=len(datasets) > 1)
        traced.append(lines)
    return traced


def _format_loss(loss: float | None) -> str:
    if loss is None:
        return "not logged"
    return f"{loss:.6g}" if math.isfinite(loss) else "not finite, or without targets"


def _print(line: TraceLine, text: bool, with_dataset: bool) -> None:
    dataset = f"{line.dataset}  " if with_dataset else ""
    columns = [f"row {line.lane:>3}  {dataset}{line.shard} {line.key}  concepts {line.start}-{line.stop}  {line.id}"]
    if not text and line.sentences:
        columns.append(" ".join(" ".join(line.sentences).split()[:FIRST_WORDS]))
    print(strip_control_chars("  ".join(columns)))
    if text:
        for index, sentence in enumerate(line.sentences, start=line.start):
            print(strip_control_chars(f"    {index:>5}  {sentence}"))
