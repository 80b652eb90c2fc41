"""Workers started by a cluster's own launcher, srun or mpirun; the config and variables that remote workers get.

Hosts get the path of a resolved config, never quoted arguments: a remote shell would expand them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from lcm_ds.config import PrepareConfig, TrainConfig, dump
from lcm_ds.deepspeed_config import find
from lcm_ds.distributed.workers import GRACE_SECONDS
from lcm_ds.errors import InputError
from lcm_ds.files import write_whole
from lcm_ds.processes import set_parent_death_signal
from lcm_ds.signals import STOPPED, TOUCH_SECONDS, StopFile, exit_code, on_stop_signal

# Variables that change what a worker does, by prefix and by name; and those that are valid only on this host.
FORWARDED_PREFIXES = re.compile("PYTHON|NCCL_|GLOO_|TORCH_|PYTORCH_|TRITON_|CUDA_|UCX_|HF_|DS_|OMP_|MKL_|TOKENIZERS_")
FORWARDED_NAMES = ("PATH", "LD_LIBRARY_PATH", "http_proxy", "https_proxy", "all_proxy", "no_proxy")
NOT_FORWARDED = ("CUDA_VISIBLE_DEVICES", "DS_ENV_FILE")
# Not to be written to a file or put on mpirun's command line unless the user asks for it.
SECRET = re.compile(r"TOKEN(?!IZERS)|SECRET|PASSW|CREDENTIAL|_KEY$", re.IGNORECASE)

# Words of `mpirun --version`: mpirun of Open MPI 4 calls itself OpenRTE if it is started by another name.
_MPI_VERSIONS = {"Open MPI": ("Open MPI", "OpenRTE"), "Hydra": ("HYDRA", "Intel(R) MPI")}


def forwarded_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that are sent to other hosts: no secrets, and no proxies that contain a password."""
    chosen = {}
    for name, value in sorted(environ.items()):
        wanted = FORWARDED_PREFIXES.match(name) or name in FORWARDED_NAMES or name.lower() in FORWARDED_NAMES
        secret = SECRET.search(name) or (name.lower().endswith("_proxy") and "@" in value)
        if wanted and not secret and name not in NOT_FORWARDED and "\n" not in value:
            chosen[name] = value
    return chosen


def resolve_config(
    config: TrainConfig | PrepareConfig | None, config_path: Path, folder: Path, name: str = "config.yaml"
) -> Path:
    """Write the config with its overrides for all hosts to read.

    Args:
        config: What is written.
        config_path: The file it comes from, relative to which it may name a DeepSpeed JSON.
        folder: The run's or the dataset's folder.
        name: The name of the new file.

    Returns:
        Its path, in `folder`/launch.
    """
    assert config is not None
    if isinstance(config, TrainConfig) and isinstance(config.deepspeed, str):
        config = config.model_copy(update={"deepspeed": str(find(config.deepspeed, config_path))})
    path = folder / "launch" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, dump(config))
    return path


def environment_of_workers(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that are sent to other hosts, and those in the user's .deepspeed_env."""
    chosen = forwarded_variables(environ)
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    for path in (Path.home() / name, Path(name)):
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                if "=" in line and not line.lstrip().startswith("#"):
                    key, value = line.split("=", 1)
                    chosen[key.strip()] = value.strip()
    return chosen


# --- srun and mpirun --------------------------------------------------------------------------------------------------


def slurm_tasks(environ: Mapping[str, str]) -> int:
    """The number of tasks of this allocation, one per device.

    Raises InputError outside an allocation, or if Slurm's variables do not give the number.
    """
    if "SLURM_JOB_ID" not in environ:
        raise InputError("--slurm: not in a Slurm allocation (SLURM_JOB_ID is not set): use it in sbatch or salloc")
    tasks, on_node = environ.get("SLURM_NTASKS"), environ.get("SLURM_GPUS_ON_NODE")
    if tasks is None and on_node is None:
        raise InputError("--slurm: neither SLURM_NTASKS nor SLURM_GPUS_ON_NODE is set: give sbatch --ntasks-per-node")
    if on_node is None:
        return int(tasks or 0)
    devices = int(environ.get("SLURM_JOB_NUM_NODES", "1")) * int(on_node)
    if tasks is not None and int(tasks) != devices:
        raise InputError(
            f"--slurm: the allocation has {tasks} tasks and {devices} devices, and each device needs a task: "
            f"give sbatch --ntasks-per-node={on_node}"
        )
    return devices


def slurm_command(tasks: int, module: str, config: Path) -> list[str]:
    """The call of srun, which ends the other tasks a while after the first one has ended.

    With --kill-on-bad-exit, the first task to exit with 75 would have the others killed while they save, and the job's
    exit code would be that of a killed task.
    """
    worker = [sys.executable, "-u", "-m", module, str(config)]
    wait = f"--wait={GRACE_SECONDS:.0f}"
    return ["srun", f"--ntasks={tasks}", "--kill-on-bad-exit=0", wait, "--export=ALL", *worker]


def mpi_program(option: str) -> tuple[str, str]:
    """The program of MPI in PATH, `mpirun` or else `mpiexec`, and whose it is: "Open MPI" or "Hydra".

    Hydra starts the processes of MPICH and of Intel MPI. Raises InputError, which names `option` of the command line,
    if there is none, if it is another one, or if --openmpi asks for Open MPI's.
    """
    name = next(filter(shutil.which, ("mpirun", "mpiexec")), None)
    if name is None:
        raise InputError(
            f"{option}: mpirun is not installed here: load the module of your cluster, or install Open MPI or MPICH"
        )
    try:
        done = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=60)
        version = (done.stdout + done.stderr).strip() or f"exit code {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        version = str(error)
    found = next((kind for kind, words in _MPI_VERSIONS.items() if any(word in version for word in words)), None)
    by_hand = f"start {name} with python -m lcm_ds.train CONFIG yourself (docs/schedulers.md)"
    if found is None:
        line = version.splitlines()[0]
        raise InputError(
            f"{option}: {shutil.which(name)} is not Open MPI's, MPICH's or Intel MPI's ({line}): {by_hand}"
        )
    if option == "--openmpi" and found != "Open MPI":
        raise InputError(
            f"--openmpi: {shutil.which(name)} is not Open MPI's: use --mpi, or put Open MPI's first in PATH"
        )
    return name, found


def mpi_command(
    program: tuple[str, str], processes: int, module: str, config: Path, environ: MutableMapping[str, str]
) -> list[str]:
    """The call of mpirun, without binding: Open MPI and Intel MPI would bind each of two processes to a single core.

    Args:
        program: What `mpi_program` has found.
        processes: Their number.
        module: Of a worker.
        config: The config that all hosts read.
        environ: The variables of the call. Those for Hydra, which sends all of them to its processes, are added.

    Returns:
        The command line.
    """
    name, kind = program
    worker = [sys.executable, "-u", "-m", module, str(config)]
    if kind == "Hydra":
        environ.setdefault("I_MPI_PIN", "0")
        return [name, "-n", str(processes), *worker]
    rendezvous = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name in environ]
    exports = [word for name in (*forwarded_variables(environ), *rendezvous) for word in ("-x", name)]
    return [name, "-np", str(processes), "--bind-to", "none", *exports, *worker]


def run_scheduler(command: Sequence[str], environ: Mapping[str, str], stop_path: Path | None) -> int:
    """Run srun or mpirun to its end.

    Both answer a signal by killing. So the first signal here becomes the file RUN/STOP, at which all ranks save and
    exit with 75; only the second one is passed on. Without such a file the first one is passed on: a preparation loses
    nothing if it is killed.

    Args:
        command: The call.
        environ: Its variables.
        stop_path: RUN/STOP, or None.

    Returns:
        The command's exit code: 0, 2 and 75 unchanged, anything else as 1; 75 after a signal without a `stop_path`.

    Raises:
        InputError: the program is not installed.
    """
    stop_file = None if stop_path is None else StopFile(stop_path)
    try:
        # In its own session: Ctrl-C on the terminal reaches only this process.
        child = subprocess.Popen(
            command, env=dict(environ), start_new_session=True, preexec_fn=set_parent_death_signal(signal.SIGTERM)
        )
    except FileNotFoundError:
        raise InputError(f"{command[0]}: is not installed here") from None
    received: list[int] = []

    def on_signal(number: int) -> None:
        received.append(number)
        if stop_file is None or len(received) > 1:
            os.killpg(child.pid, signal.SIGTERM)
            return
        stop_file.touch()
        text = "the ranks save and stop at the next step; a second signal ends them at once"
        print(f"lcm-ds launch: {signal.Signals(number).name}: {text}", file=sys.stderr, flush=True)

    restore_handlers = on_stop_signal(on_signal)
    try:
        while True:
            try:
                code = exit_code(child.wait(TOUCH_SECONDS))
                break
            except subprocess.TimeoutExpired:
                if received and stop_file is not None:
                    stop_file.touch()
    finally:
        restore_handlers()
    if received and stop_file is None:
        return STOPPED
    if received and stop_file is not None:
        stop_file.remove()
    return code
