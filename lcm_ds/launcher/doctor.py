"""`lcm-ds doctor`: what would stop a run, before it starts."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lcm_ds import ds_config
from lcm_ds.errors import Collector
from lcm_ds.launcher.hosts import check_reachable, is_this_host, read_hostfile

if TYPE_CHECKING:
    from lcm_ds.train.check import Job

PACKAGES = (
    "lcm-ds",
    "torch",
    "deepspeed",
    "transformers",
    "webdataset",
    "numpy",
    "pydantic",
    "omegaconf",
    "safetensors",
)
# What a program is for; none of them is needed for a run on one host with torch_adam.
PROGRAMS = {
    "g++": "compiles DeepSpeed's operators: fused Adam on the CPU, offload",
    "ninja": "compiles DeepSpeed's operators: fused Adam on the CPU, offload",
    "ssh": "launch --hostfile",
    "pdsh": "launch --hostfile",
    "srun": "launch --slurm",
    "mpirun": "launch --openmpi",
}


def doctor(
    config_path: str | Path | None = None, overrides: Sequence[str] = (), hostfile: str | Path | None = None
) -> int:
    """Print what this machine has and, with a config, everything that is wrong with it and the memory it needs.

    The ranks counted on are the hostfile's slots, else this machine's devices. Returns 0 where nothing would stop the
    run, else 2; the mistakes are on stderr, one a line.
    """
    for line in _machine():
        print(line)
    mistakes = Collector()
    hosts: dict[str, int] = {}
    with mistakes:
        if hostfile is not None:
            hosts = read_hostfile(hostfile)
            print(f"hosts         {', '.join(f'{name} ({slots})' for name, slots in hosts.items())}")
            check_reachable([name for name in hosts if not is_this_host(name)], hostfile)
    if config_path is not None:
        with mistakes:
            _run(config_path, overrides, sum(hosts.values()) or _devices(), on_this_host=not hosts)
    for mistake in dict.fromkeys(mistakes.mistakes):
        print(mistake, file=sys.stderr)
    return 2 if mistakes.mistakes else 0


def _machine() -> Iterator[str]:
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    yield f"python        {platform.python_version()} ({sys.executable})"
    for name in PACKAGES:
        try:
            yield f"{name:13} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name:13} not installed"
    yield f"processors    {len(os.sched_getaffinity(0))}"
    yield f"accelerator   {device.device_name()} ({device.communication_backend_name()}), {_devices()} device(s)"
    supported = [
        name for name, has in (("bf16", device.is_bf16_supported), ("fp16", device.is_fp16_supported)) if has()
    ]
    yield f"precisions    {', '.join(['fp32', *supported])}"
    for name, purpose in PROGRAMS.items():
        yield f"{name:13} {shutil.which(name) or f'not found ({purpose})'}"


def _devices() -> int:
    """Ranks that this machine has devices for; a CPU counts as one."""
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    return 1 if device.device_name() == "cpu" else max(1, device.device_count())


def _run(config_path: str | Path, overrides: Sequence[str], ranks: int, on_this_host: bool) -> None:
    """Check a run for so many ranks and print what it needs; raises InputError with every mistake."""
    from lcm_ds.train.check import check

    job = check(config_path, overrides, ranks)
    for line in _needs(job, ranks):
        print(line)
    if on_this_host:
        ds_config.check_device(job.ds, str(job.config.deepspeed))


def _needs(job: Job, ranks: int) -> Iterator[str]:
    from lcm_ds.train.memory import GIB, count_parameters, lines

    parameters, precision = count_parameters(job.model), ds_config.precision(job.ds)
    batch = job.config.batch
    yield f"run           {job.run_dir}: {job.total_steps} steps of {batch.rows_per_step} rows, {ranks} rank(s)"
    yield f"model         {parameters:,} parameters, {precision}"
    yield from lines(job.config, job.model, job.ds, ranks)
    free = shutil.disk_usage(_nearest_folder(job.run_dir)).free / GIB
    # parameters in the model's dtype, master weights and two moments
    checkpoint = parameters * (14 if precision != "float32" else 16) / GIB
    yield f"disk          {free:.1f} GiB free; a checkpoint takes about {checkpoint:.3g} GiB"


def _nearest_folder(path: Path) -> Path:
    """The path itself or the first folder above it that exists."""
    return next(folder for folder in [path, *path.resolve().parents] if folder.is_dir())
