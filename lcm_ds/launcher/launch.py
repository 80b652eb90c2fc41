"""`lcm-ds launch`: check a run or a preparation once, then start its workers, here or on many hosts."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lcm_ds.distributed.events import events
from lcm_ds.distributed.workers import run_local, run_with_restarts
from lcm_ds.errors import Collector, InputError
from lcm_ds.launcher import schedulers
from lcm_ds.launcher.multihost.hostfile import is_this_host, read_hostfile, select, visible_devices
from lcm_ds.launcher.multihost.pdsh import errors_of_call
from lcm_ds.launcher.multihost.restarts import run_on_hosts
from lcm_ds.launcher.task import DEFAULTS, LaunchOptions, LaunchTask, load_task


def launch(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    local: int | None = None,
    hostfile: str | Path | None = None,
    slurm: bool = False,
    mpi: int | None = None,
    openmpi: int | None = None,
    include: str = "",
    exclude: str = "",
    options: LaunchOptions = DEFAULTS,
    output: int | None = None,
) -> int:
    """Start the workers of a run or a preparation in one of several ways, and wait for them.

    Args:
        config_path: A config; one with a `source` is for a preparation.
        overrides: key=value.
        local: Start this number of processes on this host.
        hostfile: Start them on its hosts, over pdsh and ssh.
        slurm: Start them with srun, in an allocation.
        mpi: Start this number of processes with mpirun, of Open MPI, MPICH or Intel MPI.
        openmpi: The same, only with Open MPI's.
        include: Devices of the hostfile to use, in DeepSpeed's form.
        exclude: Devices of the hostfile to leave unused, likewise.
        options: How workers are watched and restarted.
        output: A file descriptor for the output of workers on this host, instead of stdout and stderr.

    Returns:
        The workers' exit code.

    Raises:
        InputError: before any worker starts, with all mistakes in the call, the config and the data it names.
    """
    ways = _ways(local, hostfile, slurm, mpi, openmpi)
    mpi_option = next((option for option in ("--mpi", "--openmpi") if ways[option] is not None), None)
    program = ("", "")
    collector = Collector()
    devices: dict[str, list[int]] = {}  # of each host of a hostfile
    world_size = 1
    with collector:
        if hostfile is not None:
            devices = select(read_hostfile(hostfile), include, exclude)
            world_size = sum(map(len, devices.values()))
            for host in filter(is_this_host, devices):
                visible_devices(host, devices[host], os.environ)  # raises
        if errors := options.errors(len(devices) or 1):
            raise InputError(errors)
        if hostfile is None:
            selections = [option for option, value in (("--include", include), ("--exclude", exclude)) if value]
            if misplaced := [*selections, *options.hostfile_only(local is not None)]:
                raise InputError(f"{option}: goes with --hostfile" for option in misplaced)
            world_size = _world_size(ways)
            if mpi_option is not None:
                program = schedulers.mpi_program(mpi_option)
    task: LaunchTask | None = None
    with collector:
        task = load_task(config_path, overrides, world_size)
    collector.raise_if_any()
    assert task is not None
    assert task.folder is not None

    folder = str(task.folder)
    here = local is not None or (len(devices) == 1 and is_this_host(next(iter(devices))))
    outputs = f"; each rank's output: {folder}/launch/rank-*.log" if devices and not here else ""
    print(f"{folder}: starting {_described(world_size, devices)}{task.log}{outputs}", flush=True)
    if here:
        environ = dict(os.environ)
        task.check_local(world_size)
        if devices:  # a hostfile with only this host needs no ssh
            environ["CUDA_VISIBLE_DEVICES"] = visible_devices(*next(iter(devices.items())), environ)
        worker = [sys.executable, "-u", "-m", task.module, str(config_path), *overrides]

        def run(signals: list[int]) -> int:
            events.emit("start", folder=folder, ranks=world_size)
            return run_local(worker, world_size, environ, options.master_port, options.grace, signals, output)

        return run_with_restarts(run, task.progress, options.max_restarts, options.back_off)
    if hostfile is not None and (errors := errors_of_call(task.folder)):
        raise InputError(errors)
    config = schedulers.resolve_config(task.config, Path(config_path), task.folder)
    if hostfile is not None:
        code = run_on_hosts(task, config.resolve(), devices, hostfile, options)
    else:
        environ = dict(os.environ)
        if options.master_addr is not None:
            environ["MASTER_ADDR"] = options.master_addr
        if options.master_port is not None:
            environ["MASTER_PORT"] = str(options.master_port)
        command = (
            schedulers.slurm_command(world_size, task.module, config)
            if slurm
            else schedulers.mpi_command(program, world_size, task.module, config, environ)
        )
        events.emit("start", folder=folder, ranks=world_size, command=command[0])
        code = schedulers.run_scheduler(command, environ, task.stop_file)
    missing = task.missing() if code == 0 else None
    if missing is not None:
        print(f"lcm-ds launch: the workers exited with 0, but {missing}", file=sys.stderr, flush=True)
        return 1
    return code


def _described(workers: int, devices: dict[str, list[int]]) -> str:
    """The workers of a launch, for display."""
    hosts = f"{len(devices)} hosts" if len(devices) > 1 else next(iter(devices), "")
    return f"{workers} worker{'s' if workers > 1 else ''}{hosts and f' on {hosts}'}"


def planned_ranks(
    *,
    local: int | None = None,
    hostfile: str | Path | None = None,
    slurm: bool = False,
    mpi: int | None = None,
    openmpi: int | None = None,
    include: str = "",
    exclude: str = "",
) -> int:
    """The number of workers that a launch would start, which this machine need not have devices for.

    Args:
        local: As of `launch`, and so are all others.
        hostfile: Its slots are counted, and the hosts are not asked.
        slurm: The allocation's tasks.
        mpi: Number of processes.
        openmpi: Number of processes.
        include: Devices of the hostfile to use.
        exclude: Devices of the hostfile to leave unused.

    Raises:
        InputError: not exactly one way, a number below 1, or an invalid hostfile.
    """
    ways = _ways(local, hostfile, slurm, mpi, openmpi)
    if hostfile is None:
        return _world_size(ways)
    return sum(map(len, select(read_hostfile(hostfile), include, exclude).values()))


def _ways(
    local: int | None, hostfile: str | Path | None, slurm: bool, mpi: int | None, openmpi: int | None
) -> dict[str, int | None]:
    """The options that come with a number of processes. Raises InputError unless exactly one way is given."""
    ways = {"--local": local, "--mpi": mpi, "--openmpi": openmpi}
    if sum((*(number is not None for number in ways.values()), hostfile is not None, slurm)) != 1:
        raise InputError("launch: exactly one of --local, --hostfile, --slurm, --mpi and --openmpi has to be given")
    return ways


def _world_size(ways: dict[str, int | None]) -> int:
    """The number of workers without a hostfile."""
    option, processes = next(((way, number) for way, number in ways.items() if number is not None), ("", None))
    if not option:
        return schedulers.slurm_tasks(os.environ)
    if processes is None or processes < 1:
        raise InputError(f"{option} {processes}: the number of processes has to be 1 or more")
    return processes
