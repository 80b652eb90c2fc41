"""`lcm-ds doctor CONFIG`: what would stop a run, before it starts."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lcm_ds.config import TrainConfig, load
from lcm_ds.devices import Gpu, gpu_of
from lcm_ds.distributed.workers import run_local
from lcm_ds.doctor.kernels import accelerator
from lcm_ds.doctor.machine import programs, software
from lcm_ds.errors import Collector, InputError
from lcm_ds.files import why_no_checkpoints
from lcm_ds.launcher.multihost.hostfile import read_hostfile, select
from lcm_ds.launcher.multihost.pdsh import errors_of_call
from lcm_ds.launcher.multihost.preflight import run_preflight
from lcm_ds.launcher.multihost.restarts import run_on_hosts
from lcm_ds.launcher.schedulers import environment_of_workers, resolve_config
from lcm_ds.launcher.task import DEFAULTS, LaunchOptions, LaunchTask, run_task
from lcm_ds.terminal import in_bytes
from lcm_ds.train.dry_run import Assumptions, plan_lines, read_run
from lcm_ds.train.job import ConfiguredRun, Outline, TrainJob

NONE = Assumptions()
BANDWIDTH = "lcm_ds.doctor.bandwidth"


def doctor(
    config_path: str | Path | None = None,
    overrides: Sequence[str] = (),
    hostfile: str | Path | None = None,
    bandwidth: bool = False,
    options: LaunchOptions = DEFAULTS,
    given: Assumptions = NONE,
) -> int:
    """Print a summary of this machine and, with a config, the run's memory and every mistake.

    Args:
        config_path: A run's config, checked for as many ranks as the hostfile has slots, else this machine devices.
        overrides: key=value.
        hostfile: Hosts to check as before a launch.
        bandwidth: Measure an all-reduce over all devices at the end.
        options: Of the launch.
        given: What the run's plan takes as given; the GPU by default this machine's.

    Returns:
        0 if nothing would stop the run, or on one host only that its training data is not there yet; else 2, with the
        mistakes on stderr; or the exit code of the measurement.
    """
    # Mistakes in the YAML are reported without torch and DeepSpeed, whose import takes seconds.
    valid = config_path is None or _is_valid(config_path, overrides)
    for row in (*software(), *(accelerator() if valid else ()), *programs()):
        print(f"{row.name:13} {row.value}")
    errors = Collector()
    hosts: dict[str, list[int]] = {}
    job: TrainJob | None = None
    config: Path | None = None  # for the hosts to read
    with errors:
        if hostfile is not None:
            hosts = select(read_hostfile(hostfile))
    if config_path is not None:
        with errors:
            ranks = sum(map(len, hosts.values())) or (_devices() if valid else 1)
            job = _check_run(config_path, overrides, ranks, not hosts, given)
    task = run_task(job) if job else LaunchTask(BANDWIDTH)
    if hosts:
        with errors:
            if call_errors := errors_of_call(task.folder or Path.cwd()):
                raise InputError(call_errors)
            if task.folder is not None and config_path is not None:
                config = resolve_config(task.config, Path(config_path), task.folder, "doctor.yaml").resolve()
            if not bandwidth or errors.errors:
                reports = run_preflight(task, config, hosts, environment_of_workers(os.environ), options)
                errors.errors += [f"{hostfile}: {host.name}: {text}" for host in reports for text in host.problems]
    if bandwidth and not errors.errors:
        with errors:
            if hostfile is None:
                return _measure_local()
            if config is None:
                raise InputError(
                    "--bandwidth: with --hostfile it needs a CONFIG, whose run folder the hosts share, and its data"
                )
            measurement = replace(task, module=BANDWIDTH, stop_file=None, progress=lambda: 0, can_share=lambda _: True)
            return run_on_hosts(measurement, config, hosts, hostfile, options)
    for error in dict.fromkeys(errors.errors):
        print(error, file=sys.stderr)
    return 2 if errors.errors else 0


def _is_valid(config_path: str | Path, overrides: Sequence[str]) -> bool:
    """Whether the YAML has no mistake."""
    try:
        load(TrainConfig, config_path, overrides)
    except InputError:
        return False
    return True


def _measure_local() -> int:
    if _devices() == 1:
        raise InputError("--bandwidth: this host has one device; give a hostfile")
    return run_local([sys.executable, "-u", "-m", BANDWIDTH], _devices())


def _devices() -> int:
    """The number of this machine's devices; a CPU counts as one."""
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    return 1 if device.device_name() == "cpu" else max(1, device.device_count())


def _check_run(
    config_path: str | Path, overrides: Sequence[str], ranks: int, local: bool, given: Assumptions
) -> TrainJob | None:
    """Check a run with this number of ranks and print what it needs.

    Args:
        config_path: Its config.
        overrides: key=value.
        ranks: Number of ranks.
        local: Whether this machine trains.
        given: What its plan takes as given.

    Returns:
        The run; None if its data is not there yet, which the plan shows, or its size was given instead.

    Raises:
        InputError: With every mistake.
    """
    run = read_run(config_path, overrides, ranks, given)
    from lcm_ds.checkpoint.remote import why_not_writable  # imports torch

    prices = given.prices if given.prices.gpu is not None else replace(given.prices, gpu=_own_gpu())
    for line in (*plan_lines(run, ranks, prices, shapes=False), _free_disk(run)):
        print(line)
    errors = Collector()
    with errors:
        if reason := why_no_checkpoints(_existing_folder(run.run_dir)):
            raise InputError(f"{run.run_dir}: {reason}")
    with errors:
        if run.config.checkpoint.dir is not None and (reason := why_not_writable(run.config.checkpoint.dir)):
            raise InputError(reason)
    with errors:
        if local:
            run.check_device()
    if isinstance(run, Outline) and given.concepts is None and not local:  # hosts are asked whether they have the data
        errors.errors += [f"{config_path}: data.train: {path}: not there yet; make it first" for path in run.missing]
    errors.raise_if_any()
    return run if isinstance(run, TrainJob) else None


def _own_gpu() -> Gpu | None:
    """This machine's, if it is a known one."""
    import torch

    return gpu_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def _free_disk(run: ConfiguredRun) -> str:
    folder = _existing_folder(run.run_dir)
    return f"free          {in_bytes(shutil.disk_usage(folder).free)} in {folder}"


def _existing_folder(path: Path) -> Path:
    """The path itself or the first folder above it that exists."""
    return next(folder for folder in [path, *path.resolve().parents] if folder.is_dir())
