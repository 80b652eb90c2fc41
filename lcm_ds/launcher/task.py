"""What a launch starts, and how: the task is the same on this host and on many; the options are the command line's."""

from __future__ import annotations

import dataclasses
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_ds.config import PrepareConfig, TrainConfig, load, read_yaml
from lcm_ds.errors import InputError
from lcm_ds.processes import warn_of_few_cores

if TYPE_CHECKING:
    from lcm_ds.train.job import TrainJob

# torch's packages of other accelerators, by which DeepSpeed 0.19.8 chooses its own (real_accelerator.py).
PLUGINS = ("habana_frameworks", "torch_mlu", "torch_npu", "torch_sdaa", "torch_supa", "torch_xmlir")


@dataclass(frozen=True)
class LaunchOptions:
    """How workers are started and watched, by the options of the command line. Times are in seconds."""

    max_restarts: int = 0
    min_hosts: int | None = None  # for a restart; None: all
    back_off: float = 10.0  # before a restart; doubled as long as too few hosts are fit
    silence: float = 15.0  # without a heartbeat, after which a host is lost
    grace: float = 30.0  # between SIGTERM and SIGKILL
    master_addr: str | None = None
    master_port: int | None = None
    ssh_port: int | None = None
    exclude_stragglers: bool = False  # at a restart

    def errors(self, hosts: int) -> list[str]:
        """What is wrong with them, one line each."""
        errors = []
        if self.max_restarts < 0:
            errors.append(f"--max-restarts {self.max_restarts}: has to be 0 or more")
        if self.min_hosts is not None and not 1 <= self.min_hosts <= hosts:
            errors.append(f"--min-hosts {self.min_hosts}: has to be from 1 to {hosts}, the number of hosts")
        if self.exclude_stragglers and (self.min_hosts is None or not self.max_restarts):
            errors.append("--exclude-stragglers: goes with --max-restarts and --min-hosts")
        for option, value in (("back-off", self.back_off), ("silence", self.silence), ("grace", self.grace)):
            if value <= 0:
                errors.append(f"--{option} {value:g}: has to be more than 0 seconds")
        if self.master_port is not None and not 0 < self.master_port < 2**16:
            errors.append(f"--master-port {self.master_port}: has to be from 1 to 65535")
        return errors

    def hostfile_only(self, local: bool) -> list[str]:
        """The options given that need a hostfile; some of them also work with `local` processes."""
        general = ("master_addr", "master_port", *(("max_restarts", "back_off", "grace") if local else ()))
        names = [field.name for field in dataclasses.fields(self) if field.name not in general]
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) != getattr(DEFAULTS, name)]


DEFAULTS = LaunchOptions()


@dataclass(frozen=True)
class LaunchTask:
    """A run, a preparation, or the bandwidth measurement of `lcm-ds doctor`."""

    module: str  # of a worker: python -m MODULE CONFIG
    config: TrainConfig | PrepareConfig | None = None
    folder: Path | None = None  # RUN or OUT
    stop_file: Path | None = None  # that the workers obey; None: they stop on SIGTERM
    data: dict[str, Any] = field(default_factory=dict)  # fingerprints of a run's datasets, compared on all hosts
    checkpoint_bytes: float = 0.0
    log: str = ""  # where their output is, for display
    progress: Callable[[], int] = lambda: 0  # a number that grows as the work advances
    can_share: Callable[[int], bool] = lambda ranks: True  # whether this number of ranks can share the work
    check_local: Callable[[int], None] = lambda ranks: None  # raises InputError if this host has too few devices
    stragglers: Callable[[], list[int]] = list  # the ranks that were slow, of all starts so far
    missing: Callable[[], str | None] = lambda: None  # what is missing although all workers ended well


def load_task(config_path: str | Path, overrides: Sequence[str], world_size: int) -> LaunchTask:
    """The task of a config, checked as far as possible before its workers start. Raises InputError."""
    if "source" in read_yaml(config_path, overrides):
        return preparation_task(load(PrepareConfig, config_path, overrides))
    from lcm_ds.train.job_builder import build_job

    return run_task(build_job(config_path, overrides, world_size))


def preparation_task(config: PrepareConfig) -> LaunchTask:
    """Preparing a dataset."""
    out = Path(config.output)

    def check_local(ranks: int) -> None:
        device = "cpu" if config.encoder is None else config.encoder.device
        if device in (None, "cpu"):
            _check_devices(ranks, 0 if device else local_devices(os.environ, ranks), ranks * config.threads)

    def missing() -> str | None:
        return None if (out / "train" / "dataset.json").exists() else f"{out}/train is not finished"

    def units() -> int:
        path = out / "units.jsonl"
        return len(path.read_bytes().splitlines()) if path.exists() else 0

    return LaunchTask("lcm_ds.prepare", config, out, progress=units, check_local=check_local, missing=missing)


def run_task(job: TrainJob) -> LaunchTask:
    """Training."""
    from lcm_ds.train.budget import checkpoint_size
    from lcm_ds.train.monitoring.stragglers import straggler_ranks

    rows, micro_batch = job.config.batch.rows_per_step, job.config.batch.micro_batch_rows

    def last_step() -> int:
        from lcm_ds.checkpoint.format import list_checkpoints

        return max((checkpoint.step for checkpoint in list_checkpoints(job.run_dir)), default=0)

    def missing() -> str | None:
        step = last_step()
        return None if step >= job.total_steps else f"{job.run_dir} is at step {step} of {job.total_steps}"

    return LaunchTask(
        module="lcm_ds.train",
        config=job.config,
        folder=job.run_dir,
        stop_file=job.run_dir / "STOP",
        data={"fingerprint": job.fingerprint, "validation": job.validation.fingerprint if job.validation else None},
        log=f"; log: {job.run_dir / 'log.txt'}",
        checkpoint_bytes=checkpoint_size(job),
        progress=last_step,
        can_share=lambda ranks: rows % (micro_batch * ranks) == 0,
        check_local=lambda ranks: _check_devices(ranks, local_devices(os.environ, ranks), ranks),
        stragglers=lambda: straggler_ranks(job.run_dir),
        missing=missing,
    )


def _check_devices(ranks: int, devices: int, threads: int) -> None:
    """Raise InputError if this host has fewer devices than ranks; without any, its processors are counted."""
    if devices == 0:
        warn_of_few_cores(threads)
    elif ranks > devices:
        raise InputError(f"--local {ranks}: this host has {devices} device(s)")


def local_devices(environ: Mapping[str, str], ranks: int) -> int:
    """The accelerators that workers on this host see; 0 if they compute on its processors.

    DeepSpeed's import takes seconds, so it is asked only if it may choose another kind of device than NVIDIA's, or if
    there seem to be too few. The workers, which import it anyway, check whether a device has the run's precision.

    Args:
        environ: The workers' variables.
        ranks: The workers that need a device each.
    """
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        raise ModuleNotFoundError("No module named 'torch'")
    build = runpy.run_path(str(Path(torch.origin).with_name("version.py")))
    kind, visible = environ.get("DS_ACCELERATOR"), environ.get("CUDA_VISIBLE_DEVICES")
    others = sys.platform != "linux" or build.get("hip") or build.get("xpu") or any(map(find_spec, PLUGINS))
    if kind == "cpu" or (kind is None and not others and not build["cuda"]):
        return 0
    if kind in (None, "cuda") and not others and not Path("/dev/dxg").exists():  # WSL's only node
        cards = sum(os.access(node, os.R_OK | os.W_OK) for node in Path("/dev").glob("nvidia[0-9]*"))
        named = cards if visible is None else len([each for each in visible.split(",") if each.strip()])
        if (cards == 0 and not _has_nvidia_hardware()) or (visible is not None and named == 0):
            return 0
        if ranks <= min(cards, named) and "MIG-" not in (visible or ""):
            return min(cards, named)
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    return 0 if device.device_name() == "cpu" else int(device.device_count())


def _has_nvidia_hardware() -> bool:
    """Whether a device of NVIDIA is on the PCI bus: after a boot its nodes appear only when CUDA is first used."""
    return any(path.read_text().strip() == "0x10de" for path in Path("/sys/bus/pci/devices").glob("*/vendor"))
