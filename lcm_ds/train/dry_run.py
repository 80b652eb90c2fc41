"""`lcm-ds train --dry-run`: what is known about a run before it starts, without allocating its memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lcm_ds import deepspeed_config
from lcm_ds.model.flops import training_flops
from lcm_ds.model.modeling import BaseLCM
from lcm_ds.train.job import TrainJob
from lcm_ds.train.job_builder import encoder_lines, target_coverage_lines
from lcm_ds.train.memory import memory_lines


def dry_run(job: TrainJob, ranks: int) -> None:
    """Print shapes, parameters, memory per rank, and concepts and steps of the run."""
    with torch.device("meta"):
        model = BaseLCM(job.model)
    for line in [*_shapes(model), *memory_lines(job.config, job.model, job.ds, ranks), *_steps(job, ranks)]:
        print(line)


def _shapes(model: BaseLCM) -> Iterator[str]:
    """A line for each parameter, once for all layers."""
    for name, parameter in model.named_parameters():
        if not name.startswith("layers.") or name.startswith("layers.0."):
            of_all = name.replace("layers.0.", f"layers.0-{len(model.layers) - 1}.")
            yield f"{of_all:48} {' × '.join(map(str, parameter.shape)):>14}"
    yield f"parameters    {sum(parameter.numel() for parameter in model.parameters()):,}"


def _steps(job: TrainJob, ranks: int) -> Iterator[str]:
    config, batch = job.config, job.config.batch
    concepts = batch.rows_per_step * config.data.row_length
    total = sum(shard.concepts for dataset in job.datasets for shard in dataset.shards)
    accumulated = deepspeed_config.accumulation_steps(batch.rows_per_step, batch.micro_batch_rows, ranks, "the config")
    yield (
        f"step          {concepts:,} concepts: {ranks} rank(s) × {accumulated} micro-batch(es) × "
        f"{batch.micro_batch_rows} rows × {config.data.row_length}"
    )
    longest = config.data.max_segment if job.model.attention == "document" else config.data.row_length
    flops = training_flops(job.model, concepts, concepts * (longest + 1) // 2)
    yield f"work          at most {flops / 1e12:.4g} TFLOP per step, with segments of the maximum length"
    yield (
        f"data          {total:,} concepts in {sum(len(dataset.shards) for dataset in job.datasets):,} shards: "
        f"{job.plan.row_slots / concepts:,.1f} steps per epoch"
        + (f", rows {total / job.plan.row_slots:.0%} full" if job.plan.row_slots > total else "")
    )
    yield from (f"targets       {line}" for line in target_coverage_lines(job))
    yield from (f"encoders      {line}" for line in encoder_lines(job))
    yield f"run           {job.total_steps:,} steps, {job.length()}: {job.run_dir}"
    if warning := job.warmup_warning():
        yield f"warning: {warning}"
