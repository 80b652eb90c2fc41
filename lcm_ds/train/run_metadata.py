"""Metadata of a run: in its folder, in its checkpoints and in its first lines."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import platform
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import deepspeed
import torch

import lcm_ds
from lcm_ds import deepspeed_config
from lcm_ds.config import dump
from lcm_ds.data.plan import ORDER
from lcm_ds.distributed.environment import DistEnv
from lcm_ds.files import write_whole
from lcm_ds.train.job import TrainJob
from lcm_ds.train.job_builder import encoder_lines, target_coverage_lines
from lcm_ds.train.monitoring.console import console


def identity(job: TrainJob, env: DistEnv) -> dict[str, Any]:
    """What a checkpoint has to match to be resumed (checkpoint/load.py), and how it was made."""
    return {
        "fingerprint": job.fingerprint,
        "order": ORDER,
        "model": job.model.sizes(),
        "init_from": job.config.model.init_from,
        "precision": deepspeed_config.precision(job.ds),
        "optimizer": job.ds["optimizer"]["type"],
        "zero_stage": deepspeed_config.zero_stage(job.ds),
        "nvme": deepspeed_config.offloads_to_nvme(job.ds),
        "world_size": env.world_size,
        "config": job.config.model_dump(mode="json"),
        "deepspeed": job.ds,
        "config_sha256": hashlib.sha256((dump(job.config) + json.dumps(job.ds)).encode()).hexdigest(),
        "versions": versions(),
    }


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the libraries that determine a run's numbers, and the project's git commit in a checkout."""
    commit = ""
    with contextlib.suppress(OSError):  # no git on this machine
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "lcm_ds": lcm_ds.__version__,
        "git_commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": version("transformers"),
        "torchao": "not installed" if find_spec("torchao") is None else version("torchao"),  # only used by fp8
    }


def write_run_config(job: TrainJob, env: DistEnv) -> None:
    """Write the resolved configs, with versions and world size (rank 0)."""
    write_whole(
        job.run_dir / "config.yaml", dump(job.config, started_in=Path.cwd(), world_size=env.world_size, **versions())
    )
    write_whole(job.run_dir / "ds_config.json", json.dumps(job.ds, indent=2) + "\n")


def log_run_header(
    job: TrainJob, env: DistEnv, engine: deepspeed.DeepSpeedEngine, first_step: int, loaded: str | None = None
) -> None:
    """Print the first lines of a run.

    Args:
        job: The run.
        env: For the number of ranks.
        engine: For the number of parameters.
        first_step: Steps done so far.
        loaded: The origin of the initial weights, if they are not random.
    """
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    lanes = job.plan.lanes_per_source
    data = ", ".join(
        f"{dataset.path} ({sum(shard.concepts for shard in dataset.shards):,} concepts, "
        f"{count} of {sum(lanes)} rows of a step)"
        for dataset, count in zip(job.datasets, lanes, strict=True)
    )
    lines = [
        f"{job.run_dir}: {parameters:,} parameters, {env.world_size} rank(s), "
        f"ZeRO {deepspeed_config.zero_stage(job.ds)}, {deepspeed_config.precision(job.ds)}"
        + (f", products in {job.config.train.precision}" if job.config.train.precision else ""),
        *([] if loaded is None else [loaded]),
        f"data: {data}",
        *target_coverage_lines(job),
        *encoder_lines(job),
        f"step {first_step} of {job.total_steps}, {job.config.batch.rows_per_step} rows of "
        f"{job.config.data.row_length} concepts per step" + (", resumed" if first_step else ""),
        f"total: {job.length()}",
    ]
    for line in lines:
        console.line(line)
    if warning := job.warmup_warning():
        console.warning(warning)
