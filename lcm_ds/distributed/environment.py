"""The rank of this process and the address of rank 0, read from the variables that any of the known launchers sets.

These are RANK … (torchrun, torch.distributed.launch, DeepSpeed's launcher, accelerate, Kubernetes' PyTorchJob, `lcm-ds
launch --local`), and those in the table LAUNCHERS. Without any of them the run has one process, unless other variables
show that a launcher has started several: these would each take themselves for the only one, and are refused.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import socket
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from lcm_ds.errors import InputError, RunFailedError
from lcm_ds.processes import exit_with_parent

DEFAULT_PORT = 29500  # torch.distributed's and DeepSpeed's
FREE_PORTS = (20_000, 29_000)  # below Linux's net.ipv4.ip_local_port_range, and DEFAULT_PORT
ORPHANING_LAUNCHERS = ("OMPI_COMM_WORLD_RANK", "TORCHELASTIC_RUN_ID")  # set by mpirun and torchrun


@dataclass(frozen=True)
class Launcher:
    """The variables by which a launcher numbers its processes; of several names, the first one that is set counts."""

    name: str
    marks: tuple[str, ...]  # it is this launcher if all of them are set
    rank: str
    size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]
    hosts: str | None  # their number, if the launcher gives no local size
    master_addr: str  # how to give the processes the host of rank 0, if there are several hosts
    source: str  # of these names


# An mpirun or mpiexec inside a Slurm or Flux allocation starts its daemons with srun or flux: the processes also have
# their daemon's variables. So it comes before srun; MPICH's is told from `srun --mpi=pmi2`, which also sets PMI_RANK,
# by MPI_LOCALRANKID. jsrun of Spectrum MPI sets Open MPI's variables as well, Slurm and Flux have plugins for PALS'.
LAUNCHERS = (
    Launcher(
        "LSF's jsrun",
        marks=("JSM_NAMESPACE_RANK",),
        rank="JSM_NAMESPACE_RANK",
        size=("JSM_NAMESPACE_SIZE",),
        local_rank=("JSM_NAMESPACE_LOCAL_RANK",),
        local_size=("JSM_NAMESPACE_LOCAL_SIZE",),
        hosts=None,
        master_addr="jsrun -E MASTER_ADDR=$(sed -n 2p $LSB_DJOB_RANKFILE)",  # line 1 is the batch node
        source="lightning.fabric.plugins.environments.LSFEnvironment",
    ),
    Launcher(
        "Open MPI's mpirun",
        marks=("OMPI_COMM_WORLD_RANK",),
        rank="OMPI_COMM_WORLD_RANK",
        size=("OMPI_COMM_WORLD_SIZE",),
        local_rank=("OMPI_COMM_WORLD_LOCAL_RANK",),
        local_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
        hosts=None,
        master_addr="mpirun -x MASTER_ADDR=<host of rank 0>",
        source="mpirun(1), seen with 4.1.4 and 5.0.11",
    ),
    Launcher(
        "MPICH's or Intel MPI's mpiexec",
        marks=("PMI_RANK", "MPI_LOCALRANKID"),
        rank="PMI_RANK",
        size=("PMI_SIZE",),
        local_rank=("MPI_LOCALRANKID",),
        local_size=("MPI_LOCALNRANKS",),
        hosts=None,
        master_addr="mpiexec -genv MASTER_ADDR <host of rank 0>",
        source="seen with MPICH 4.0.2 and 5.0.2 and Intel MPI 2021.19",
    ),
    Launcher(
        "MVAPICH's mpirun_rsh",
        marks=("MV2_COMM_WORLD_RANK",),
        rank="MV2_COMM_WORLD_RANK",
        size=("MV2_COMM_WORLD_SIZE",),
        local_rank=("MV2_COMM_WORLD_LOCAL_RANK",),
        local_size=("MV2_COMM_WORLD_LOCAL_SIZE",),
        hosts=None,
        master_addr="mpirun_rsh … MASTER_ADDR=<host of rank 0> python …",
        source="accelerate.utils.environment.get_cpu_distributed_information",
    ),
    Launcher(
        "Slurm's srun",
        # An sbatch script has SLURM_PROCID=0 and SLURM_NTASKS, too, but only an srun step has several tasks.
        marks=("SLURM_PROCID", "SLURM_STEP_ID|SLURM_STEPID|SLURM_STEP_NODELIST"),
        rank="SLURM_PROCID",
        size=("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        local_rank=("SLURM_LOCALID",),
        local_size=(),  # see _slurm_local_size
        hosts=None,
        master_addr="",  # the first of SLURM_STEP_NODELIST
        source="srun(1), seen with 22.05 and --mpi=none and pmi2",
    ),
    Launcher(
        "Flux",
        marks=("FLUX_TASK_RANK",),
        rank="FLUX_TASK_RANK",
        size=("FLUX_JOB_SIZE",),
        local_rank=("FLUX_TASK_LOCAL_ID",),
        local_size=(),
        hosts="FLUX_JOB_NNODES",
        master_addr="flux run --env=MASTER_ADDR=$(flux hostlist --nth=0 local)",
        source="flux-core, src/shell/task.c; flux-environment(7)",
    ),
    Launcher(
        "Cray PALS' mpiexec",
        marks=("PALS_RANKID",),
        rank="PALS_RANKID",
        size=("PMI_SIZE",),
        local_rank=("PALS_LOCAL_RANKID", "PMI_LOCAL_RANK"),
        local_size=("PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"),
        hosts=None,
        master_addr="mpiexec --env MASTER_ADDR=$(head -n 1 $PBS_NODEFILE)",
        source="Slurm, plugins/mpi/cray_shasta; scripts of ALCF for Polaris and Aurora",
    ),
    Launcher(
        "a launcher with PMI",
        marks=("PMI_RANK",),
        rank="PMI_RANK",
        size=("PMI_SIZE",),
        local_rank=("PMI_LOCAL_RANK", "LOCAL_RANK"),
        local_size=("PMI_LOCAL_SIZE", "LOCAL_WORLD_SIZE"),
        hosts=None,
        master_addr="set MASTER_ADDR=<host of rank 0> for every process",
        source="seen with MPICH 5.0.2's mpiexec.gforker, which sets neither a local rank nor a local size",
    ),
)
# What else shows that a launcher has started this process: the number of its processes, if it is above one, or any
# value of a variable that only processes of a job have. Slurm's are missing, because its batch scripts have them.
_COUNTS = [
    name for row in LAUNCHERS for name in (*row.size, *row.local_size) if not name.startswith(("SLURM_", "LOCAL_"))
]
_MARKS = {
    "PMIX_RANK": "a PMIx launcher such as prterun",
    "MPT_LRANK": "HPE MPT's mpiexec_mpt",
    "ALPS_APP_PE": "Cray ALPS' aprun",
}


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
        _check_alone(environ)
        return DistEnv.local(0, 1, free_port())
    _check_ranges(env, variables.errors)
    if variables.errors:
        raise InputError(variables.errors)
    return env


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """Take the option that DeepSpeed's launcher (`_`) and torch.distributed.launch (`-`) add to a worker's command.

    Both of them set LOCAL_RANK as well, which is used instead.
    """
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by launchers; LOCAL_RANK is used instead")


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

    def first(self, names: Sequence[str], default: int | None = None) -> int:
        """The number in the first of these variables that is set."""
        return self(next((name for name in names if name in self.environ), names[0]), default)


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
    for launcher in LAUNCHERS:
        if all(any(name in environ for name in mark.split("|")) for mark in launcher.marks):
            return _from_launcher(launcher, variables)
    return None


def _from_launcher(launcher: Launcher, variables: _Variables) -> DistEnv:
    environ = variables.environ
    world_size = variables.first(launcher.size)
    local_rank = variables.first(launcher.local_rank, None if world_size > 1 else 0)
    port: int | Callable[[], int] = free_port if world_size == 1 else DEFAULT_PORT
    address = environ.get("MASTER_ADDR")
    if launcher.rank == "SLURM_PROCID":
        local_size = _slurm_local_size(variables, local_rank)
        # The same for all tasks of a job, different between jobs, and below the ports of outgoing connections.
        port = lambda: 20000 + variables("SLURM_JOB_ID", 0) % 12000  # noqa: E731
        address = address or _slurm_first_host(variables, world_size)
    elif launcher.hosts is not None:  # as many on each host, but for the last ones
        local_size = max(local_rank + 1, -(-world_size // max(1, variables(launcher.hosts, 1))))
    else:
        local_size = variables.first(launcher.local_size, world_size)
    if address is None and local_size < world_size:
        variables.errors.append(f"environment: MASTER_ADDR is missing: {launcher.master_addr}")
    return DistEnv(
        variables(launcher.rank),
        world_size,
        local_rank,
        local_size,
        address or "127.0.0.1",
        variables("MASTER_PORT", port),
    )


def _slurm_local_size(variables: _Variables, local_rank: int) -> int:
    per_node = variables.environ.get("SLURM_STEP_TASKS_PER_NODE", variables.environ.get("SLURM_TASKS_PER_NODE", ""))
    return tasks_on_node(per_node, variables("SLURM_NODEID", 0)) or max(1, local_rank + 1)


def _slurm_first_host(variables: _Variables, world_size: int) -> str:
    nodes = variables.environ.get("SLURM_STEP_NODELIST", variables.environ.get("SLURM_JOB_NODELIST"))
    if nodes is None and world_size > 1:
        variables.errors.append("environment: neither MASTER_ADDR nor SLURM_JOB_NODELIST is set: the host of rank 0")
    return first_host(nodes) if nodes is not None else "127.0.0.1"


def _check_alone(environ: Mapping[str, str]) -> None:
    """Raise InputError if another launcher than the known ones has started this process, probably with others."""
    signs = {name: "a launcher" for name in _COUNTS if re.fullmatch(r"0*([2-9]|[1-9]\d+)", environ.get(name, ""))}
    signs |= {name: launcher for name, launcher in _MARKS.items() if name in environ}
    for name, launcher in signs.items():
        raise InputError(
            f"environment: {name}={environ[name]}: started by {launcher} that does not tell each process its rank, so "
            "that each would train alone: set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each "
            "process, or use lcm-ds launch; RANK=0 WORLD_SIZE=1 if it is the only one"
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
