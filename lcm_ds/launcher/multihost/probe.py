"""`python -m lcm_ds.launcher.multihost.probe FILE NUMBER`: what a host finds out about itself, as JSON.

The launcher asks all hosts at once through pdsh and judges the answers (see preflight.py). FILE is in RUN/launch/, or
"-" where there is no run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lcm_ds
from lcm_ds.errors import InputError
from lcm_ds.launcher.multihost import protocol

PACKAGES = ("torch", "deepspeed", "transformers", "webdataset", "numpy", "pydantic", "omegaconf", "safetensors")
LONGEST_SECONDS = 100  # the launcher waits a little longer
DISCARD_PORT = 9  # nothing is sent there: the kernel is asked for the way alone


def versions() -> dict[str, str]:
    """What has to be the same on all hosts: Python, packages, this package with its sources."""
    found = {"python": platform.python_version(), "lcm-ds": f"{lcm_ds.__version__} ({_digest_of_sources()})"}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def way_to(addresses: Iterable[str]) -> tuple[str, str | None]:
    """This host's own address on the way to the first of these that is another host's, and its interface."""
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, DISCARD_PORT))
            except OSError:
                continue
            own = str(probe.getsockname()[0])
        if own != address and not own.startswith("127."):
            return own, _interface_of(own)
    return "127.0.0.1", None


def devices() -> tuple[str, int | None]:
    """The kind of this host's devices and how many it has; a CPU takes as many ranks as one likes."""
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    kind = device.device_name()
    return kind, None if kind == "cpu" else device.device_count()


def port_is_free(port: int) -> bool:
    """Whether rank 0 could listen there."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            # Not `listen`: two hosts that are two names of one machine would find each other there.
            listener.bind(("", port))
        except OSError:
            return False
    return True


def _interface_of(address: str) -> str | None:
    import psutil

    for name, there in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in there):
            return name
    return None


def _digest_of_sources() -> str:
    folder, digest = Path(lcm_ds.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


def _check_config(path: str, accelerated: bool) -> dict[str, Any]:
    """The run's datasets as this host reads them, and whether its device can do what the config asks for."""
    from lcm_ds import deepspeed_config
    from lcm_ds.train.job_builder import build_job

    job = build_job(path, (), 1)  # the number of ranks is the launcher's business
    if accelerated:
        deepspeed_config.check_device(job.ds, path)
    return {"fingerprint": job.fingerprint, "validation": job.validation.fingerprint if job.validation else None}


def _connect(questions: dict[str, Any], number: int) -> None:
    protocol.connect(
        protocol.launcher_addresses(questions["launcher"]), questions["port"], questions["token"], number
    ).close()


def probe(path: str, number: int) -> dict[str, Any]:
    """Everything about this host; what cannot be found out is among its `problems`."""
    report: dict[str, Any] = {"number": number, "versions": versions(), "problems": []}

    def attempt(name: str, find: Callable[[], Any], what: str) -> None:
        try:
            report[name] = find()
        except InputError as error:
            report["problems"] += error.errors
        except Exception as error:
            report["problems"].append(f"{what}: {type(error).__name__}: {error}")

    questions = None
    if path != "-":
        try:
            questions = json.loads(Path(path).read_text(encoding="utf-8"))
            os.environ.update(questions["environment"])
        except (OSError, ValueError) as error:
            report["problems"].append(
                f"{path}: cannot be read: {error}; the run folder has to be the same on all hosts, as the same user"
            )
    attempt("devices", devices, "devices")
    if questions is not None:
        came_from = os.environ.get("SSH_CONNECTION", "").split()[:1]
        report["address"], report["interface"] = way_to([*questions["peers"], *came_from])
        report["port_is_free"] = port_is_free(questions["master_port"])
        answer = Path(path).with_name(f"{Path(path).stem}-{number}")
        attempt("written", lambda: answer.write_text(questions["token"]), f"{answer}: cannot be written")
        attempt("free", lambda: shutil.disk_usage(answer.parent).free, "free disk")
        attempt("reached", lambda: _connect(questions, number), "no connection to the launcher")
        if questions["config"] is not None:
            accelerated = report.get("devices", ("cpu", None))[0] != "cpu"
            attempt("data", lambda: _check_config(questions["config"], accelerated), questions["config"])
    report["time"] = time.time()
    return report


if __name__ == "__main__":
    signal.alarm(LONGEST_SECONDS)  # a file system that hangs
    print(json.dumps(probe(sys.argv[1], int(sys.argv[2]))), flush=True)
