"""`python -m lcm_ds.launcher.multihost.probe FILE INDEX`: a host's report on itself, as JSON.

The launcher asks all hosts at once through pdsh and judges the answers (see preflight.py). FILE is in RUN/launch/, or
"-" without a run.
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
TIMEOUT_SECONDS = 100  # the launcher waits a little longer
DISCARD_PORT = 9  # nothing is sent there: the kernel only looks up the route


def versions() -> dict[str, str]:
    """What has to be the same on all hosts: Python, packages, and the sources of this package."""
    versions = {"python": platform.python_version(), "lcm-ds": f"{lcm_ds.__version__} ({_digest_of_sources()})"}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def route_address(peer: str) -> str | None:
    """This host's own address on the route to another address; None without a route."""
    family = socket.AF_INET6 if ":" in peer else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, DISCARD_PORT))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def address_and_interface(peers: Iterable[str]) -> tuple[str, str | None]:
    """This host's address on the route to the first peer that is another host, and the network interface."""
    for peer in peers:
        own = route_address(peer)
        if own is not None and own != peer and not own.startswith("127."):
            return own, _interface_of(own)
    return "127.0.0.1", None


def devices() -> tuple[str, int | None]:
    """The kind of this host's devices and their number; None for a CPU, which takes any number of ranks."""
    from lcm_ds.launcher.task import local_devices

    # Without DeepSpeed's import, unless a kind of device is asked for, of which there may be none.
    if os.environ.get("DS_ACCELERATOR") in (None, "cpu") and local_devices(os.environ, ranks=1) == 0:
        return "cpu", None
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    kind = device.device_name()
    return kind, None if kind == "cpu" else device.device_count()


def port_is_free(port: int) -> bool:
    """Whether rank 0 could listen there."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            # No `listen`: two hosts that are two names of one machine would block each other.
            listener.bind(("", port))
        except OSError:
            return False
    return True


def _interface_of(address: str) -> str | None:
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None


def _digest_of_sources() -> str:
    folder, digest = Path(lcm_ds.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


def _check_config(path: str, accelerated: bool) -> dict[str, Any]:
    """The fingerprints of the run's datasets on this host. Raises InputError."""
    from lcm_ds.train.job_builder import build_job

    job = build_job(path, (), 1)  # the launcher has checked the number of ranks
    if accelerated:
        job.check_device()
    return {"fingerprint": job.fingerprint, "validation": job.validation.fingerprint if job.validation else None}


def _connect(questions: dict[str, Any], index: int) -> None:
    addresses = protocol.addresses_to_try(questions["launcher"])
    protocol.connect(addresses, questions["port"], questions["token"], index).close()


def probe(path: str, index: int) -> dict[str, Any]:
    """This host's report; its `problems` are the checks that failed."""
    report: dict[str, Any] = {"number": index, "versions": versions(), "problems": []}

    def attempt(name: str, check: Callable[[], Any], description: str) -> None:
        try:
            report[name] = check()
        except InputError as error:
            report["problems"] += error.errors
        except Exception as error:
            report["problems"].append(f"{description}: {type(error).__name__}: {error}")

    questions = None
    if path != "-":
        try:
            questions = json.loads(Path(path).read_text(encoding="utf-8"))
            os.environ.update(questions["environment"])
        except (OSError, ValueError) as error:
            report["problems"].append(
                f"{path}: cannot be read: {error}; all hosts need the same run folder and the same user"
            )
    attempt("devices", devices, "devices")
    if questions is not None:
        ssh_origin = os.environ.get("SSH_CONNECTION", "").split()[:1]
        report["address"], report["interface"] = address_and_interface([*questions["peers"], *ssh_origin])
        report["port_is_free"] = port_is_free(questions["master_port"])
        answer = Path(path).with_name(f"{Path(path).stem}-{index}")
        attempt("written", lambda: answer.write_text(questions["token"]), f"{answer}: cannot be written")
        attempt("free", lambda: shutil.disk_usage(answer.parent).free, "free disk")
        attempt("reached", lambda: _connect(questions, index), "no connection to the launcher")
        if questions["config"] is not None:
            accelerated = report.get("devices", ("cpu", None))[0] != "cpu"
            attempt("data", lambda: _check_config(questions["config"], accelerated), questions["config"])
    report["time"] = time.time()
    return report


if __name__ == "__main__":
    signal.alarm(TIMEOUT_SECONDS)  # if a file system hangs
    print(json.dumps(probe(sys.argv[1], int(sys.argv[2]))), flush=True)
