"""The processes of a run on other hosts: what travels there, and launchers that are there already, srun and mpirun.

What is sent to a host is the path of a resolved config, never quoted arguments: a remote shell would expand them.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from lcm_ds.config import PrepareConfig, TrainConfig, dump
from lcm_ds.deepspeed_config import find
from lcm_ds.distributed.workers import GRACE_SECONDS, STOPPED, exit_code
from lcm_ds.errors import InputError
from lcm_ds.files import write_whole
from lcm_ds.processes import set_parent_death_signal

# Variables that change what a worker does.
TRAVELS = (
    "PYTHON",
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "PYTORCH_",
    "TRITON_",
    "CUDA_",
    "UCX_",
    "HF_",
    "DS_",
    "OMP_",
    "MKL_",
    "TOKENIZERS_",
)
TRAVELS_BY_NAME = ("PATH", "LD_LIBRARY_PATH", "http_proxy", "https_proxy", "all_proxy", "no_proxy")
STAYS = ("CUDA_VISIBLE_DEVICES", "DS_ENV_FILE")
# What nobody asked to be put into a file, or on mpirun's command line.
SECRET = re.compile(r"TOKEN(?!IZERS)|SECRET|PASSW|CREDENTIAL|_KEY$", re.IGNORECASE)
TOUCH_SECONDS = 1.0


def travelling(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that go along to other hosts; secrets do not, nor proxies with a password in them."""
    chosen = {}
    for name, value in sorted(environ.items()):
        wanted = name.startswith(TRAVELS) or name in TRAVELS_BY_NAME or name.lower() in TRAVELS_BY_NAME
        secret = SECRET.search(name) or (name.lower().endswith("_proxy") and "@" in value)
        if wanted and not secret and name not in STAYS and "\n" not in value:
            chosen[name] = value
    return chosen


def resolve_config(
    config: TrainConfig | PrepareConfig, config_path: Path, folder: Path, name: str = "config.yaml"
) -> Path:
    """Write the config with its overrides into the run's or the dataset's folder, where every host sees it.

    Returns its path.
    """
    if isinstance(config, TrainConfig) and isinstance(config.deepspeed, str):
        # As found from the first config: the copy lies elsewhere.
        config = config.model_copy(update={"deepspeed": str(find(config.deepspeed, config_path))})
    path = folder / "launch" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, dump(config))
    return path


def environment_of_workers(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that travel, and those that the user's own .deepspeed_env names."""
    chosen = travelling(environ)
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    for own in (Path.home() / name, Path(name)):
        if own.is_file():
            for line in own.read_text(encoding="utf-8").splitlines():
                if "=" in line and not line.lstrip().startswith("#"):
                    key, value = line.split("=", 1)
                    chosen[key.strip()] = value.strip()
    return chosen


# --- srun and mpirun --------------------------------------------------------------------------------------------------


def slurm_tasks(environ: Mapping[str, str]) -> int:
    """How many tasks a step has in this allocation: one a device.

    Raises InputError outside an allocation, or where it does not say how many devices a node has.
    """
    if "SLURM_JOB_ID" not in environ:
        raise InputError("--slurm: this is no Slurm allocation (SLURM_JOB_ID is not set): use it in sbatch or salloc")
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
    """The call of srun; where one task ends the others are given a while, and are then ended by Slurm.

    --kill-on-bad-exit would give them none: the first task that ends with 75 would have those killed that are still on
    their way out, and the job's exit code would be the killed ones'.
    """
    worker = [sys.executable, "-u", "-m", module, str(config)]
    wait = f"--wait={GRACE_SECONDS:.0f}"
    return ["srun", f"--ntasks={tasks}", "--kill-on-bad-exit=0", wait, "--export=ALL", *worker]


def openmpi_command(processes: int, module: str, config: Path, environ: Mapping[str, str]) -> list[str]:
    """The call of mpirun. Without `--bind-to none` it would bind each of two processes to a single core."""
    rendezvous = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name in environ]
    exports = [word for name in (*travelling(environ), *rendezvous) for word in ("-x", name)]
    worker = [sys.executable, "-u", "-m", module, str(config)]
    return ["mpirun", "-np", str(processes), "--bind-to", "none", *exports, *worker]


# --- waiting ----------------------------------------------------------------------------------------------------------


def follow(command: Sequence[str], environ: Mapping[str, str], stop_file: Path | None) -> int:
    """Run another launcher's command to its end; returns its exit code: 0, 2 and 75 as they are, anything else as 1.

    These launchers answer a signal by killing. So the first one here becomes the file RUN/STOP, at which all ranks
    save and end with 75; the second one is passed on. The file is made again and again: a run that is about to begin
    takes one for left over, and away. Without such a file (what is prepared loses nothing by being killed) the first
    one is passed on, and the exit code is 75.
    """
    try:
        # A session of its own: a Ctrl-C on the terminal reaches this process alone.
        child = subprocess.Popen(
            command, env=dict(environ), start_new_session=True, preexec_fn=set_parent_death_signal(signal.SIGTERM)
        )
    except FileNotFoundError:
        raise InputError(f"{command[0]}: is not installed here") from None
    with _stopping(child, stop_file) as asked:
        while True:
            try:
                code = exit_code(child.wait(TOUCH_SECONDS))
                break
            except subprocess.TimeoutExpired:
                if asked and stop_file is not None:
                    _touch(stop_file)
    if asked and stop_file is not None:
        stop_file.unlink(missing_ok=True)  # where nobody has answered it: the next start is not to find it
    return STOPPED if asked and stop_file is None else code


def _touch(file: Path) -> None:
    with contextlib.suppress(OSError):  # a file server that is away does not end the launcher
        file.touch()


@contextlib.contextmanager
def _stopping(child: subprocess.Popen[bytes], stop_file: Path | None) -> Iterator[list[int]]:
    """While inside, signals are answered; yields those that came."""
    asked: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if stop_file is None or len(asked) > 1:
            os.killpg(child.pid, signal.SIGTERM)
            return
        _touch(stop_file)
        said = f"{signal.Signals(number).name}: the ranks save and stop at the next step; once more ends them at once"
        print(f"lcm-ds launch: {said}", file=sys.stderr, flush=True)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    previous = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
