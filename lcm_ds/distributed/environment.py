"""The rank of this process and the address of rank 0, read from the variables that any of the known launchers sets.

These are RANK … (torchrun, DeepSpeed's launcher, Kubernetes' PyTorchJob, `lcm-ds launch --local`), OMPI_COMM_WORLD_*
(mpirun), and SLURM_* inside an srun step. Without any of them the run has one process.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

from lcm_ds.errors import InputError, RunFailedError
from lcm_ds.processes import exit_with_parent

DEFAULT_PORT = 29500  # torch.distributed's and DeepSpeed's
FREE_PORTS = (20_000, 29_000)  # below Linux's net.ipv4.ip_local_port_range, and DEFAULT_PORT
ORPHANING_LAUNCHERS = ("OMPI_COMM_WORLD_RANK", "TORCHELASTIC_RUN_ID")  # set by mpirun and torchrun


@dataclass(frozen=True)
class DistEnv:
    """The rank of one process, and where rank 0 listens."""

    rank: int
    world_size: int
    local_rank: int  # among the processes of this host
    local_world_size: int
    master_addr: str
    master_port: int

    @classmethod
    def local(cls, rank: int, world_size: int, port: int) -> DistEnv:
        """One of the processes of a run on this host."""
        return cls(rank, world_size, rank, world_size, "127.0.0.1", port)

    def environment(self) -> dict[str, str]:
        """The variables that torch.distributed and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }

    def device_index(self, devices: int) -> int:
        """This process's device among those that it sees, which under srun --gpus-per-task=1 is one for every rank."""
        return self.local_rank % devices

    def enter(self, environ: MutableMapping[str, str], devices: int = 0) -> None:
        """Set this process's variables for torch.distributed and DeepSpeed.

        devices: Number of GPUs that this process sees; 0 on CPUs. In several places DeepSpeed takes LOCAL_RANK for the
        index of its device, and it asserts that Open MPI's variable is the same.
        """
        environ.update(self.environment())
        if devices:
            environ["LOCAL_RANK"] = str(self.device_index(devices))
            environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)

    def apply_to(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The variables for a process of this rank: `environ` without those of an outer torchrun."""
        inherited = {name: value for name, value in environ.items() if not name.startswith("TORCHELASTIC_")}
        return {**inherited, **self.environment()}


def detect_environment(environ: Mapping[str, str]) -> DistEnv:
    """Read this process's rank from its variables; without any it is rank 0 of 1.

    Raises InputError if variables are missing, are not numbers, or contradict one another.
    """
    scheduler, variables = _Variables(environ), _Variables(environ)
    env = scheduler_env = _from_scheduler(scheduler)
    if "RANK" in environ or "WORLD_SIZE" in environ:
        env = _from_rank(variables)
        if scheduler_env is not None and not scheduler.errors:
            _check_nesting(env, scheduler_env, variables.errors)
    else:
        variables = scheduler
    if env is None:
        return DistEnv.local(0, 1, free_port())
    _check_ranges(env, variables.errors)
    if variables.errors:
        raise InputError(variables.errors)
    return env


def exit_with_launcher(environ: Mapping[str, str]) -> None:
    """End this process when the mpirun or torchrun that started it ends, however that happens.

    A killed torchrun leaves its workers running; so does Open MPI 4.1's mpirun after a SIGTERM on a busy host.
    """
    if any(name in environ for name in ORPHANING_LAUNCHERS):
        exit_with_parent()


def free_port() -> int:
    """A TCP port of this host that is free now.

    It lies below the ports of outgoing connections, any of which could take it before it is used.
    """
    for port in random.SystemRandom().sample(range(*FREE_PORTS), 100):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port
    raise RunFailedError(f"no free port of this host among 100 from {FREE_PORTS[0]} to {FREE_PORTS[1]}")


def first_host(nodelist: str) -> str:
    """The first host of a Slurm list: 'n[03-07,12],login' → 'n03'."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group()) if first else nodelist


def tasks_on_node(tasks_per_node: str, node: int) -> int | None:
    """The number of tasks on a node: ('2(x3),1', 3) → 1; None if the list does not contain it."""
    counts: list[int] = []
    for part in tasks_per_node.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[node] if node < len(counts) else None


class _Variables:
    """Reads numbers from the environment and collects errors."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.errors: list[str] = []

    def __call__(self, name: str, default: int | Callable[[], int] | None = None) -> int:
        """The number in variable `name`; an error if it is missing without a default, or is not a number."""
        text = self.environ.get(name)
        if text is None:
            if default is None:
                self.errors.append(f"environment: {name} is missing")
                return 0
            return default() if callable(default) else default
        if not re.fullmatch(r"\d+", text.strip()):
            self.errors.append(f"environment: {name}={text!r}: has to be an integer of at least 0")
            return 0
        return int(text)


def _from_rank(variables: _Variables) -> DistEnv:
    environ = variables.environ
    rank, world_size = variables("RANK"), variables("WORLD_SIZE")
    # A PyTorchJob starts one process in each pod, and sets no local ranks.
    local_rank = variables("LOCAL_RANK", 0)
    local_size = variables("LOCAL_SIZE", world_size if "LOCAL_RANK" in environ else 1)  # DeepSpeed's name for it
    single = world_size <= 1
    if not single and "MASTER_ADDR" not in environ:
        variables.errors.append("environment: MASTER_ADDR is missing: the host of rank 0")
    return DistEnv(
        rank,
        world_size,
        local_rank,
        variables("LOCAL_WORLD_SIZE", local_size),
        environ.get("MASTER_ADDR", "127.0.0.1"),
        variables("MASTER_PORT", free_port if single else None),
    )


def _from_scheduler(variables: _Variables) -> DistEnv | None:
    environ = variables.environ
    if "OMPI_COMM_WORLD_RANK" in environ:
        return _from_mpirun(variables)
    # An sbatch script has SLURM_PROCID=0 and SLURM_NTASKS, too, but only an srun step has several tasks.
    if "SLURM_PROCID" in environ and {"SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NODELIST"} & environ.keys():
        return _from_srun(variables)
    return None


def _from_mpirun(variables: _Variables) -> DistEnv:
    environ = variables.environ
    world_size = variables("OMPI_COMM_WORLD_SIZE")
    local_size = variables("OMPI_COMM_WORLD_LOCAL_SIZE", world_size)
    address = environ.get("MASTER_ADDR")
    if address is None and local_size < world_size:
        variables.errors.append("environment: MASTER_ADDR is missing: mpirun -x MASTER_ADDR=<host of rank 0>")
    return DistEnv(
        variables("OMPI_COMM_WORLD_RANK"),
        world_size,
        variables("OMPI_COMM_WORLD_LOCAL_RANK", 0),
        local_size,
        address or "127.0.0.1",
        variables("MASTER_PORT", free_port if world_size == 1 else DEFAULT_PORT),
    )


def _from_srun(variables: _Variables) -> DistEnv:
    environ = variables.environ
    world_size = variables("SLURM_STEP_NUM_TASKS", lambda: variables("SLURM_NTASKS"))
    local_rank = variables("SLURM_LOCALID", 0)
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", ""))
    address = environ.get("MASTER_ADDR")
    if address is None:
        nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST"))
        if nodes is None and world_size > 1:
            variables.errors.append(
                "environment: neither MASTER_ADDR nor SLURM_JOB_NODELIST is set: the host of rank 0"
            )
        address = first_host(nodes) if nodes is not None else "127.0.0.1"
    return DistEnv(
        variables("SLURM_PROCID"),
        world_size,
        local_rank,
        tasks_on_node(per_node, variables("SLURM_NODEID", 0)) or max(1, local_rank + 1),
        address,
        # The same for all tasks of a job, different between jobs, and below the ports of outgoing connections.
        variables("MASTER_PORT", lambda: 20000 + variables("SLURM_JOB_ID", 0) % 12000),
    )


def _check_nesting(env: DistEnv, scheduler_env: DistEnv, errors: list[str]) -> None:
    """Under torchrun inside tasks of mpirun or srun, each task has at least one process.

    Fewer ranks, or as many in another order, come from variables left over in a shell, which all tasks would share.
    """
    same = (env.rank, env.world_size) == (scheduler_env.rank, scheduler_env.world_size)
    if not same and env.world_size <= scheduler_env.world_size:
        errors.append(
            f"environment: RANK={env.rank} and WORLD_SIZE={env.world_size} contradict the scheduler, for which "
            f"this is process {scheduler_env.rank} of {scheduler_env.world_size}; unset RANK and WORLD_SIZE"
        )


def _check_ranges(env: DistEnv, errors: list[str]) -> None:
    if errors:
        return  # placeholders, not the user's values
    if env.world_size < 1:
        errors.append(f"environment: the world size is {env.world_size}: has to be 1 or more")
    elif env.rank >= env.world_size:
        errors.append(f"environment: rank {env.rank} of {env.world_size}: ranks go from 0 to the world size minus 1")
    elif env.local_rank >= env.local_world_size:
        errors.append(
            f"environment: local rank {env.local_rank} of {env.local_world_size}: "
            "local ranks go from 0 to the local world size minus 1"
        )
    if not 0 < env.master_port < 2**16:
        errors.append(f"environment: MASTER_PORT={env.master_port}: has to be from 1 to 65535")
