"""Where this process stands among the processes of a run, read from whatever variables its launcher set.

Known are RANK … (torchrun, DeepSpeed's launcher, Kubernetes' PyTorchJob, `lcm-ds launch --local`), OMPI_COMM_WORLD_*
(mpirun) and SLURM_* inside an srun step; without any of them the run has one process.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lcm_ds.errors import InputError, RunFailedError
from lcm_ds.processes import exit_with_parent

DEFAULT_PORT = 29500  # torch.distributed's and DeepSpeed's
QUIET_PORTS = (20_000, 29_000)  # below Linux's net.ipv4.ip_local_port_range, and DEFAULT_PORT
LEAVE_BEHIND = ("OMPI_COMM_WORLD_RANK", "TORCHELASTIC_RUN_ID")  # what mpirun and torchrun set


@dataclass(frozen=True)
class DistEnv:
    """One process of a run."""

    rank: int
    world_size: int
    local_rank: int  # among the processes of this host
    local_world_size: int
    master_addr: str
    master_port: int

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

    def within(self, environ: Mapping[str, str]) -> dict[str, str]:
        """An environment in which a process has this place, whatever torchrun has said of its own in `environ`."""
        return {**{name: said for name, said in environ.items() if not _of_torchrun(name)}, **self.environment()}


def _of_torchrun(name: str) -> bool:
    return name.startswith("TORCHELASTIC_")


def detect_environment(environ: Mapping[str, str]) -> DistEnv:
    """This process's place.

    Raises InputError where variables are missing, are no numbers, or contradict one another.
    """
    scheduled, numbers = _Numbers(environ), _Numbers(environ)
    place = outer = _place_given_by_scheduler(scheduled)
    if "RANK" in environ or "WORLD_SIZE" in environ:
        place = _from_rank(numbers)
        if outer is not None and not scheduled.errors:
            _check_within(place, outer, numbers.errors)
    else:
        numbers = scheduled
    if place is None:
        return DistEnv(0, 1, 0, 1, "127.0.0.1", free_port())
    _check_ranges(place, numbers.errors)
    if numbers.errors:
        raise InputError(numbers.errors)
    return place


def exit_with_launcher(environ: Mapping[str, str]) -> None:
    """Where mpirun or torchrun started this process: end it with them, however they end.

    torchrun that is killed leaves its workers at work; so does Open MPI 4.1's mpirun at a SIGTERM on a busy host.
    """
    if any(name in environ for name in LEAVE_BEHIND):
        exit_with_parent()


def free_port() -> int:
    """A TCP port of this host that nobody listens on now.

    From below those that the kernel gives to outgoing connections, any of which could take it before it is used.
    """
    for port in random.SystemRandom().sample(range(*QUIET_PORTS), 100):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port
    raise RunFailedError(f"no free port of this host among 100 from {QUIET_PORTS[0]} to {QUIET_PORTS[1]}")


def first_host(nodelist: str) -> str:
    """The first host of a Slurm list: 'n[03-07,12],login' → 'n03'."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group()) if first else nodelist


def tasks_on_node(tasks_per_node: str, node: int) -> int | None:
    """Tasks on the node of that number: ('2(x3),1', 3) → 1; None where the list does not say."""
    counts: list[int] = []
    for part in tasks_per_node.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[node] if node < len(counts) else None


class _Numbers:
    """Reads numbers from the environment and remembers what was wrong with them."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.errors: list[str] = []

    def __call__(self, name: str, default: int | Callable[[], int] | None = None) -> int:
        """The number in variable `name`; a missing one without a default, or one that is no number, is a mistake."""
        text = self.environ.get(name)
        if text is None:
            if default is None:
                self.errors.append(f"environment: {name} is missing")
                return 0
            return default() if callable(default) else default
        if not re.fullmatch(r"\d+", text.strip()):
            self.errors.append(f"environment: {name}={text!r}: has to be a whole number from 0")
            return 0
        return int(text)


def _from_rank(numbers: _Numbers) -> DistEnv:
    environ = numbers.environ
    rank, world_size = numbers("RANK"), numbers("WORLD_SIZE")
    # A PyTorchJob starts one process in each pod, and says nothing of local ranks.
    local_rank = numbers("LOCAL_RANK", 0)
    local_size = numbers("LOCAL_SIZE", world_size if "LOCAL_RANK" in environ else 1)  # DeepSpeed's name for it
    alone = world_size <= 1
    if not alone and "MASTER_ADDR" not in environ:
        numbers.errors.append("environment: MASTER_ADDR is missing: the host of rank 0")
    return DistEnv(
        rank,
        world_size,
        local_rank,
        numbers("LOCAL_WORLD_SIZE", local_size),
        environ.get("MASTER_ADDR", "127.0.0.1"),
        numbers("MASTER_PORT", free_port if alone else None),
    )


def _place_given_by_scheduler(numbers: _Numbers) -> DistEnv | None:
    environ = numbers.environ
    if "OMPI_COMM_WORLD_RANK" in environ:
        return _from_mpirun(numbers)
    # An sbatch script has SLURM_PROCID=0 and SLURM_NTASKS, too: only in a step of srun are there other tasks.
    if "SLURM_PROCID" in environ and {"SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NODELIST"} & environ.keys():
        return _from_srun(numbers)
    return None


def _from_mpirun(numbers: _Numbers) -> DistEnv:
    environ = numbers.environ
    world_size = numbers("OMPI_COMM_WORLD_SIZE")
    local_size = numbers("OMPI_COMM_WORLD_LOCAL_SIZE", world_size)
    address = environ.get("MASTER_ADDR")
    if address is None and local_size < world_size:
        numbers.errors.append("environment: MASTER_ADDR is missing: mpirun -x MASTER_ADDR=<host of rank 0>")
    return DistEnv(
        numbers("OMPI_COMM_WORLD_RANK"),
        world_size,
        numbers("OMPI_COMM_WORLD_LOCAL_RANK", 0),
        local_size,
        address or "127.0.0.1",
        numbers("MASTER_PORT", free_port if world_size == 1 else DEFAULT_PORT),
    )


def _from_srun(numbers: _Numbers) -> DistEnv:
    environ = numbers.environ
    world_size = numbers("SLURM_STEP_NUM_TASKS", lambda: numbers("SLURM_NTASKS"))
    local_rank = numbers("SLURM_LOCALID", 0)
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", ""))
    address = environ.get("MASTER_ADDR")
    if address is None:
        nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST"))
        if nodes is None and world_size > 1:
            numbers.errors.append("environment: neither MASTER_ADDR nor SLURM_JOB_NODELIST says where rank 0 is")
        address = first_host(nodes) if nodes is not None else "127.0.0.1"
    return DistEnv(
        numbers("SLURM_PROCID"),
        world_size,
        local_rank,
        tasks_on_node(per_node, numbers("SLURM_NODEID", 0)) or max(1, local_rank + 1),
        address,
        # The same for all tasks of a job, another one for another job, and below the ports that clients are given.
        numbers("MASTER_PORT", lambda: 20000 + numbers("SLURM_JOB_ID", 0) % 12000),
    )


def _check_within(place: DistEnv, outer: DistEnv, errors: list[str]) -> None:
    """Under torchrun in tasks of mpirun or srun each task has at least one process.

    Fewer, or the same number in another order, are variables left over in a shell: every task would believe in them.
    """
    same = (place.rank, place.world_size) == (outer.rank, outer.world_size)
    if not same and place.world_size <= outer.world_size:
        errors.append(
            f"environment: RANK={place.rank} and WORLD_SIZE={place.world_size} contradict the scheduler, for which "
            f"this is process {outer.rank} of {outer.world_size}; unset RANK and WORLD_SIZE"
        )


def _check_ranges(place: DistEnv, errors: list[str]) -> None:
    if errors:
        return  # the numbers are not those that were meant
    if place.world_size < 1:
        errors.append(f"environment: the world size is {place.world_size}: has to be 1 or more")
    elif place.rank >= place.world_size:
        errors.append(f"environment: rank {place.rank} of {place.world_size}: ranks go from 0 to the world size less 1")
    elif place.local_rank >= place.local_world_size:
        errors.append(
            f"environment: local rank {place.local_rank} of {place.local_world_size}: "
            "local ranks go from 0 to the local world size less 1"
        )
    if not 0 < place.master_port < 2**16:
        errors.append(f"environment: MASTER_PORT={place.master_port}: has to be from 1 to 65535")
