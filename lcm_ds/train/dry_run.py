"""`lcm-ds train --dry-run`: what is known about a run before it starts, even without its data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lcm_ds import deepspeed_config
from lcm_ds.devices import Prices
from lcm_ds.errors import InputError
from lcm_ds.model.sizes import Sizes, count_parameters, parameter_shapes
from lcm_ds.terminal import in_bytes
from lcm_ds.train.budget import budget_lines, step_flops
from lcm_ds.train.job import ConfiguredRun, Outline, TrainJob
from lcm_ds.train.job_builder import build_job, encoder_lines, outline, target_coverage_lines
from lcm_ds.train.memory import memory_lines


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes as given."""

    prices: Prices = field(default_factory=Prices)
    concepts: int | None = None  # of an epoch, instead of the dataset's
    embed_dim: int | None = None  # of these concepts; None: the model's

    def errors(self) -> Iterator[str]:
        """What is wrong with them, one line each."""
        yield from self.prices.errors()
        if self.embed_dim is not None and self.concepts is None:
            yield f"--embed-dim {self.embed_dim}: goes with --concepts"


def dry_run(path: str | Path, overrides: Sequence[str], ranks: int, given: Assumptions) -> None:
    """Print shapes, parameters, memory per rank, concepts and steps of the run, hours and disk.

    Args:
        path: A train config.
        overrides: `key=value` with dotted keys.
        ranks: Number of ranks.
        given: What is assumed.

    Raises:
        InputError: With every error in the config and the data that is there, one line each.
    """
    for line in plan_lines(read_run(path, overrides, ranks, given), ranks, given.prices):
        print(line)


def read_run(path: str | Path, overrides: Sequence[str], ranks: int, given: Assumptions) -> ConfiguredRun:
    """The run of a config: a TrainJob, or an Outline if its data is not there or its size is given instead.

    Args:
        path: A train config.
        overrides: `key=value` with dotted keys.
        ranks: Number of ranks.
        given: What is assumed.

    Raises:
        InputError: With every error, one line each.
    """
    if errors := [*given.errors()]:
        raise InputError(errors)
    without_data = outline(path, overrides, ranks, given.concepts, given.embed_dim)
    return without_data or build_job(path, overrides, ranks)


def plan_lines(run: ConfiguredRun, ranks: int, prices: Prices, shapes: bool = True) -> Iterator[str]:
    """Everything that is known about a run, one line each.

    Args:
        run: The run.
        ranks: Number of ranks.
        prices: The GPU and its price.
        shapes: Also those of its parameters.
    """
    yield f"parameters    {count_parameters(run.model):,} in {deepspeed_config.precision(run.ds)}"
    yield from memory_lines(run.config, run.model, run.ds, ranks)
    yield from _steps(run, ranks)
    yield from budget_lines(run, ranks, prices)
    yield from _shapes(run.model) if shapes else ()


def _shapes(model: Sizes) -> Iterator[str]:
    """A line for each parameter, once for all layers."""
    for name, shape in parameter_shapes(model).items():
        if not name.startswith("layers.") or name.startswith("layers.0."):
            of_all = name.replace("layers.0.", f"layers.0-{model.num_hidden_layers - 1}.")
            yield f"{of_all:48} {' × '.join(map(str, shape)):>14}"


def _steps(run: ConfiguredRun, ranks: int) -> Iterator[str]:
    config, batch = run.config, run.config.batch
    accumulated = deepspeed_config.accumulation_steps(batch.rows_per_step, batch.micro_batch_rows, ranks, "the config")
    yield (
        f"step          {run.step_concepts:,} concepts: {ranks} rank(s) × {accumulated} micro-batch(es) × "
        f"{batch.micro_batch_rows} rows × {config.data.row_length}"
    )
    yield f"work          at most {step_flops(run) / 1e12:.4g} TFLOP per step, with segments of the maximum length"
    yield from _data_of_job(run) if isinstance(run, TrainJob) else _data_of_outline(run)
    if run.total_steps is None:
        yield f"run           {config.epochs} epoch(s) of data whose size is not known: {run.run_dir}"
    else:
        yield f"run           {run.total_steps:,} steps, {run.length()}: {run.run_dir}"
    if warning := run.warmup_warning():
        yield f"warning: {warning}"


def _data_of_job(job: TrainJob) -> Iterator[str]:
    total = sum(shard.concepts for dataset in job.datasets for shard in dataset.shards)
    yield (
        f"data          {total:,} concepts in {sum(len(dataset.shards) for dataset in job.datasets):,} shards: "
        f"{job.plan.row_slots / job.step_concepts:,.1f} steps per epoch"
        + (f", rows {total / job.plan.row_slots:.0%} full" if job.plan.row_slots > total else "")
    )
    yield from (f"targets       {line}" for line in target_coverage_lines(job))
    yield from (f"encoders      {line}" for line in encoder_lines(job))


def _data_of_outline(run: ConfiguredRun) -> Iterator[str]:
    assert isinstance(run, Outline)
    if run.missing:
        yield f"data          not there yet: {', '.join(run.missing)}"
    if run.epoch_concepts is not None:
        dims = run.model.embed_dim
        yield (
            f"data          {run.epoch_concepts:,} concepts of {dims} (--concepts): "
            f"{run.epoch_concepts / run.step_concepts:,.1f} steps per epoch; on disk "
            f"{in_bytes(2 * dims * run.epoch_concepts)} as float16, {in_bytes(dims * run.epoch_concepts)} as int8, "
            "and the sentences"
        )
