"""`lcm-ds doctor`: what would stop a run, before it starts."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lcm_ds import deepspeed_config
from lcm_ds.distributed.environment import DEFAULT_PORT
from lcm_ds.distributed.workers import run_local
from lcm_ds.doctor.kernels import accelerator
from lcm_ds.doctor.machine import programs, software
from lcm_ds.errors import Collector, InputError
from lcm_ds.launcher.multihost.hostfile import read_hostfile, select
from lcm_ds.launcher.multihost.pdsh import mistakes_of_call
from lcm_ds.launcher.multihost.preflight import LaunchRequirements, ask, checkpoint_bytes
from lcm_ds.launcher.multihost.restarts import DEFAULTS, LaunchOptions, Work, run_on_hosts
from lcm_ds.launcher.schedulers import environment_of_workers, resolve_config

if TYPE_CHECKING:
    from lcm_ds.train.job import TrainJob

MEASUREMENT = "lcm_ds.doctor.bandwidth"


def doctor(
    config_path: str | Path | None = None,
    overrides: Sequence[str] = (),
    hostfile: str | Path | None = None,
    bandwidth: bool = False,
    settings: LaunchOptions = DEFAULTS,
) -> int:
    """Print a few lines about this machine and, with a config, everything that is wrong with it and its memory.

    The ranks counted on are the hostfile's slots, else this machine's devices. The hosts of a hostfile are asked as
    before a launch. bandwidth: measure an all-reduce over all devices at the end. Returns 0 where nothing would stop
    the run, else 2 (or what the measurement ends with); the mistakes are on stderr, one a line.
    """
    for row in (*software(), *accelerator(), *programs()):
        print(f"{row.name:13} {row.found}")
    errors = Collector()
    hosts: dict[str, list[int]] = {}
    job: TrainJob | None = None
    with errors:
        if hostfile is not None:
            hosts = select(read_hostfile(hostfile))
    if config_path is not None:
        with errors:
            job = _run(config_path, overrides, sum(map(len, hosts.values())) or _devices(), on_this_host=not hosts)
    work: Work | None = None
    if hosts and hostfile is not None:
        with errors:
            work = _work(job, config_path, settings)
            if not bandwidth or errors.errors:
                found = ask(hosts, work.expected, work.environment, settings.ssh_port)
                errors.errors += [f"{hostfile}: {host.name}: {text}" for host in found for text in host.problems]
    if bandwidth and not errors.errors:
        with errors:
            return _measure(work, hosts, hostfile, settings)
    for mistake in dict.fromkeys(errors.errors):
        print(mistake, file=sys.stderr)
    return 2 if errors.errors else 0


def _work(job: TrainJob | None, config_path: str | Path | None, settings: LaunchOptions) -> Work:
    """A measurement on hosts, with what is to be expected of them: of a run, or without one."""
    port = settings.master_port or DEFAULT_PORT
    if wrong := mistakes_of_call(job.run_dir if job else Path.cwd()):
        raise InputError(wrong)
    config, expected = Path("-"), LaunchRequirements()
    if job is not None and config_path is not None:
        config = resolve_config(job.config, Path(config_path), job.run_dir, "doctor.yaml").resolve()
        expected = LaunchRequirements.of(job, config, port, settings.master_addr)
    return Work(MEASUREMENT, config, expected, environment_of_workers(os.environ), None, lambda: 0, lambda ranks: True)


def _measure(
    work: Work | None, hosts: dict[str, list[int]], hostfile: str | Path | None, settings: LaunchOptions
) -> int:
    """An all-reduce over all devices of the hosts, or of this one. Raises InputError where there is nothing to do."""
    if work is not None and hostfile is not None:
        if work.expected.folder is None:
            raise InputError("--bandwidth: with --hostfile it needs a CONFIG, for its run folder is what hosts share")
        return run_on_hosts(work, hosts, hostfile, settings)
    if _devices() == 1:
        raise InputError("--bandwidth: this host has one device; give a hostfile")
    return run_local([sys.executable, "-u", "-m", MEASUREMENT], _devices())


def _devices() -> int:
    """Ranks that this machine has devices for; a CPU counts as one."""
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    return 1 if device.device_name() == "cpu" else max(1, device.device_count())


def _run(config_path: str | Path, overrides: Sequence[str], ranks: int, on_this_host: bool) -> TrainJob:
    """Check a run for so many ranks and print what it needs; raises InputError with every mistake."""
    from lcm_ds.train.job_builder import build_job

    job = build_job(config_path, overrides, ranks)
    for line in _needs(job, ranks):
        print(line)
    if on_this_host:
        deepspeed_config.check_device(job.ds, str(job.config.deepspeed))
    return job


def _needs(job: TrainJob, ranks: int) -> Iterator[str]:
    from lcm_ds.train.memory import GIB, count_parameters, memory_lines

    parameters, precision = count_parameters(job.model), deepspeed_config.precision(job.ds)
    batch = job.config.batch
    yield f"run           {job.run_dir}: {job.total_steps} steps of {batch.rows_per_step} rows, {ranks} rank(s)"
    yield f"model         {parameters:,} parameters, {precision}"
    yield from memory_lines(job.config, job.model, job.ds, ranks)
    free = shutil.disk_usage(_nearest_folder(job.run_dir)).free / GIB
    checkpoint = checkpoint_bytes(job) / GIB
    yield f"disk          {free:.1f} GiB free; a checkpoint takes about {checkpoint:.3g} GiB"


def _nearest_folder(path: Path) -> Path:
    """The path itself or the first folder above it that exists."""
    return next(folder for folder in [path, *path.resolve().parents] if folder.is_dir())
