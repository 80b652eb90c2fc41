"""`lcm-ds launch`: check a run or a preparation once, then start its workers, here or on many hosts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lcm_ds.config import PrepareConfig, TrainConfig, load, read_yaml
from lcm_ds.distributed.environment import DEFAULT_PORT
from lcm_ds.distributed.workers import run_local, run_with_restarts
from lcm_ds.errors import Collector, InputError
from lcm_ds.launcher import schedulers
from lcm_ds.launcher.multihost.hostfile import is_this_host, read_hostfile, select
from lcm_ds.launcher.multihost.pdsh import mistakes_of_call
from lcm_ds.launcher.multihost.preflight import LaunchRequirements
from lcm_ds.launcher.multihost.restarts import DEFAULTS, LaunchOptions, Work, run_on_hosts

if TYPE_CHECKING:
    from lcm_ds.train.job import TrainJob


@dataclass(frozen=True)
class _Task:
    """What is started: a run, or a preparation."""

    module: str
    config: TrainConfig | PrepareConfig
    folder: Path  # RUN or OUT
    stops: bool  # whether its workers look for RUN/STOP
    check_local: Callable[[int], None]  # raises InputError where this host cannot have so many of its workers
    missing: Callable[[], str | None]  # what is not there although all workers ended well
    progress: Callable[[], int]  # how far it has come: a number that grows
    divides: Callable[[int], bool]  # whether so many ranks can share the work
    job: TrainJob | None = None  # of a run


def launch(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    local: int | None = None,
    hostfile: str | Path | None = None,
    slurm: bool = False,
    openmpi: int | None = None,
    include: str = "",
    exclude: str = "",
    settings: LaunchOptions = DEFAULTS,
    output: int | None = None,
) -> int:
    """Start the workers of a run, or of a preparation, in one of four ways, and wait for them; returns their exit code.

    A config with a source of text is one of a preparation.

    `local`: so many processes on this host. `hostfile`: on its hosts over pdsh and ssh, with `include` and `exclude` in
    DeepSpeed's form, watched and started again as `settings` say. `slurm`: srun, in an allocation. `openmpi`: so many
    processes of mpirun. `output`: a file descriptor for what workers of this host say, instead of stdout and stderr.
    Raises InputError, before any worker starts, for every mistake in the call, the config and what the config names.
    """
    if sum((local is not None, hostfile is not None, slurm, openmpi is not None)) != 1:
        raise InputError("launch: exactly one of --local, --hostfile, --slurm and --openmpi has to be given")
    errors = Collector()
    devices: dict[str, list[int]] = {}
    world_size = 1
    with errors:
        if hostfile is not None:
            devices = select(read_hostfile(hostfile), include, exclude)
            world_size = sum(len(slots) for slots in devices.values())
            if wrong := settings.errors(len(devices)):
                raise InputError(wrong)
        elif wrong := settings.errors(1):
            raise InputError(wrong)
        elif wrong := [
            *(option for option, said in (("--include", include), ("--exclude", exclude)) if said),
            *settings.of_hosts_alone(local is not None),
        ]:
            raise InputError(f"{option}: goes with --hostfile" for option in wrong)
        elif slurm:
            world_size = schedulers.slurm_tasks(os.environ)
        else:
            world_size = _processes(local, "--local") if local is not None else _processes(openmpi, "--openmpi")
    task: _Task | None = None
    with errors:
        task = _task(config_path, overrides, world_size)
    errors.raise_if_any()
    assert task is not None

    worker = [sys.executable, "-u", "-m", task.module, str(config_path), *overrides]
    here = len(devices) == 1 and is_this_host(next(iter(devices)))
    if local is not None or here:
        environ = dict(os.environ)
        task.check_local(world_size)
        if here:  # nothing to reach over ssh: the same as --local, on the devices that the hostfile leaves
            environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, next(iter(devices.values()))))
        return run_with_restarts(
            lambda asked: run_local(worker, world_size, environ, settings.master_port, settings.grace, asked, output),
            task.progress,
            settings.max_restarts,
            settings.back_off,
        )
    if hostfile is not None:
        code = _on_hosts(task, Path(config_path), devices, hostfile, settings)
    else:
        config = schedulers.resolve_config(task.config, Path(config_path), task.folder)
        environ = {**os.environ, **_rendezvous(settings.master_addr, settings.master_port)}
        command = (
            schedulers.slurm_command(world_size, task.module, config)
            if slurm
            else schedulers.openmpi_command(world_size, task.module, config, environ)
        )
        code = schedulers.follow(command, environ, task.folder / "STOP" if task.stops else None)
    missing = task.missing() if code == 0 else None
    if missing is not None:
        print(f"lcm-ds launch: the workers ended, and {missing}", file=sys.stderr, flush=True)
        return 1
    return code


def _on_hosts(
    task: _Task, config_path: Path, devices: dict[str, list[int]], hostfile: str | Path, settings: LaunchOptions
) -> int:
    """Start the workers over pdsh and ssh, and watch them."""
    if wrong := mistakes_of_call(task.folder):
        raise InputError(wrong)
    config = schedulers.resolve_config(task.config, config_path, task.folder).resolve()
    port = settings.master_port or DEFAULT_PORT
    work = Work(
        module=task.module,
        config=config,
        expected=LaunchRequirements.of(task.job, config, port, settings.master_addr)
        if task.job
        else LaunchRequirements(config.parent, master_port=port, master_addr=settings.master_addr),
        environment=schedulers.environment_of_workers(os.environ),
        stop_file=task.folder.resolve() / "STOP" if task.stops else None,
        progress=task.progress,
        divides=task.divides,
    )
    return run_on_hosts(work, devices, hostfile, settings)


def _task(config_path: str | Path, overrides: Sequence[str], world_size: int) -> _Task:
    """What the config is for, checked as far as can be before its workers are there."""
    if "source" in read_yaml(config_path, overrides):
        return _preparation(load(PrepareConfig, config_path, overrides))
    from lcm_ds.train.job_builder import build_job

    return _run(build_job(config_path, overrides, world_size))


def _preparation(config: PrepareConfig) -> _Task:
    out = Path(config.output)

    def check_local(processes: int) -> None:
        import torch

        devices = torch.cuda.device_count()
        if config.encoder.device is None and 0 < devices < processes:
            raise InputError(f"--local {processes}: this host has {devices} CUDA devices")

    def missing() -> str | None:
        return None if (out / "train" / "dataset.json").exists() else f"{out}/train is not finished"

    def units() -> int:
        path = out / "units.jsonl"
        return len(path.read_bytes().splitlines()) if path.exists() else 0

    return _Task("lcm_ds.prepare", config, out, False, check_local, missing, units, lambda ranks: True)


def _run(job: TrainJob) -> _Task:
    rows, micro_batch = job.config.batch.rows_per_step, job.config.batch.micro_batch_rows

    def newest() -> int:
        from lcm_ds.checkpoint.format import list_checkpoints

        return max((checkpoint.step for checkpoint in list_checkpoints(job.run_dir)), default=0)

    def missing() -> str | None:
        steps = newest()
        return None if steps >= job.total_steps else f"{job.run_dir} is at step {steps} of {job.total_steps}"

    return _Task(
        module="lcm_ds.train",
        config=job.config,
        folder=job.run_dir,
        stops=True,
        check_local=lambda processes: _check_devices(job, processes),
        missing=missing,
        progress=newest,
        divides=lambda ranks: rows % (micro_batch * ranks) == 0,
        job=job,
    )


def _processes(number: int | None, option: str) -> int:
    if number is None or number < 1:
        raise InputError(f"{option} {number}: the number of processes has to be 1 or more")
    return number


def _check_devices(job: TrainJob, processes: int) -> None:
    """Refuse, on the host that trains, more processes than devices and a precision that the device has not got."""
    from deepspeed.accelerator import get_accelerator

    from lcm_ds import deepspeed_config

    errors = Collector()
    with errors:
        deepspeed_config.check_device(
            job.ds, job.config.deepspeed if isinstance(job.config.deepspeed, str) else "deepspeed"
        )
    device = get_accelerator()
    if device.device_name() != "cpu" and processes > device.device_count():
        errors.errors.append(
            f"--local {processes}: this host has {device.device_count()} {device.device_name()} devices"
        )
    errors.raise_if_any()


def _rendezvous(master_addr: str | None, master_port: int | None) -> Mapping[str, str]:
    """Where the workers meet, as far as the call says it; the rest is found by distributed/environment.py."""
    said = {"MASTER_ADDR": master_addr, "MASTER_PORT": str(master_port) if master_port else None}
    return {name: value for name, value in said.items() if value}
