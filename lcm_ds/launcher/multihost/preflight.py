"""What would stop a run on many hosts, found on all of them at once, before a device is touched."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_ds.launcher.multihost.hostfile import is_this_host
from lcm_ds.launcher.multihost.launch_spec import write_private
from lcm_ds.launcher.multihost.output import OutputPrinter
from lcm_ds.launcher.multihost.pdsh import on_hosts
from lcm_ds.launcher.multihost.probe import DISCARD_PORT, LONGEST_SECONDS, versions
from lcm_ds.launcher.multihost.protocol import Listener

if TYPE_CHECKING:
    from lcm_ds.train.job import TrainJob

SKEW_SECONDS = 10.0
GIB = 2**30


@dataclass(frozen=True)
class LaunchRequirements:
    """What the hosts are compared with: what the launcher has found here."""

    folder: Path | None = None  # RUN/launch, absolute; None where there is no run
    config: str | None = None  # of a run, whose datasets are looked at
    data: dict[str, Any] = field(default_factory=dict)  # their fingerprints
    checkpoint_bytes: float = 0.0
    master_port: int = 0
    master_addr: str | None = None

    @classmethod
    def of(cls, job: TrainJob, config: Path, master_port: int, master_addr: str | None = None) -> LaunchRequirements:
        """What a run expects; config: resolved, in RUN/launch."""
        data = {"fingerprint": job.fingerprint, "validation": job.validation.fingerprint if job.validation else None}
        return cls(config.parent, str(config), data, checkpoint_bytes(job), master_port, master_addr)


@dataclass
class HostReport:
    """One host."""

    name: str
    problems: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    arrived: float = 0.0

    @property
    def address(self) -> str:
        """Where the others reach it."""
        return str(self.report.get("address", "127.0.0.1"))

    def line(self) -> str:
        """The host in one line."""
        if self.problems:
            count = len(self.problems)
            return f"{self.name:14} {count} problem{'s' if count > 1 else ''}"
        kind, count = self.report["devices"]
        parts = [f"Python {self.report['versions']['python']}", f"torch {self.report['versions']['torch']}"]
        parts.append(kind if count is None else f"{count} × {kind}")
        if "free" in self.report:
            parts.append(f"{self.report['free'] / GIB:.0f} GiB free")
        parts.append(f"clock {self.report['time'] - self.arrived:+.1f} s")
        if self.report.get("interface"):
            parts.append(f"{self.report['interface']} {self.address}")
        return f"{self.name:14} ok: {', '.join(parts)}"


def checkpoint_bytes(job: TrainJob) -> float:
    """About what a checkpoint takes: parameters in the model's dtype, master weights and two moments."""
    from lcm_ds import deepspeed_config
    from lcm_ds.train.memory import count_parameters

    return count_parameters(job.model) * (14 if deepspeed_config.precision(job.ds) != "float32" else 16)


async def preflight(
    hosts: Mapping[str, list[int]],
    expected: LaunchRequirements,
    environment: Mapping[str, str],
    listener: Listener,
    screen: OutputPrinter,
    ssh_port: int | None = None,
) -> list[HostReport]:
    """Ask all hosts, each with the devices that it is to have; a line on the screen for each.

    environment: that their workers are going to have.

    Returns them in their order, each with everything that is wrong with it.
    """
    names = list(hosts)
    token = secrets.token_hex(16)
    path: Path | str = "-"
    if expected.folder is not None:
        path = expected.folder / "preflight.json"
        peers = await asyncio.to_thread(addresses_of, names)
        questions = {
            "token": token,
            "launcher": own_addresses(peers),
            "port": listener.port,
            "peers": peers,
            "config": expected.config,
            "master_port": expected.master_port,
            "environment": dict(environment),
        }
        await asyncio.to_thread(write_private, path, json.dumps(questions))
    listener.expect(token)
    try:
        found = await _ask(names, path, ssh_port)
        for host in found:
            if host.report:
                host.problems += problems_of(host, hosts[host.name], expected)
        _compare(found, token, expected)
    finally:
        listener.expect("")
        if expected.folder is not None:
            for number in range(len(names)):
                (expected.folder / f"preflight-{number}").unlink(missing_ok=True)
            Path(path).unlink(missing_ok=True)
    for host in found:
        screen.say(host.line())
    return found


def ask(
    hosts: Mapping[str, list[int]],
    expected: LaunchRequirements,
    environment: Mapping[str, str],
    ssh_port: int | None = None,
) -> list[HostReport]:
    """`preflight` alone, for a caller that has no event loop."""

    async def run() -> list[HostReport]:
        screen = OutputPrinter()
        try:
            async with Listener() as listener:
                return await preflight(hosts, expected, environment, listener, screen, ssh_port)
        finally:
            screen.close()

    return asyncio.run(run())


async def _ask(names: list[str], path: Path | str, ssh_port: int | None) -> list[HostReport]:
    """Every host's report, or why there is none."""
    found = [HostReport(name) for name in names]
    labels = [name.rpartition("@")[2] for name in names]
    said: dict[str, list[str]] = {label: [] for label in labels}

    def on_line(label: str, text: str, error: bool) -> None:
        if error:
            said.setdefault(label, []).append(text.strip())
            return
        with contextlib.suppress(ValueError, LookupError, TypeError):  # what a login shell prints
            report = json.loads(text)
            host = found[report["number"]]
            host.report, host.arrived = report, time.time()
            host.problems += report["problems"]

    late = False
    try:
        await asyncio.wait_for(
            on_hosts(names, "lcm_ds.launcher.multihost.probe", path, on_line, ssh_port), LONGEST_SECONDS + 20
        )
    except asyncio.TimeoutError:
        late = True
    for label, host in zip(labels, found, strict=True):
        if not host.report:
            words = said[label] or said.get(label.partition(".")[0])  # pdsh cuts a domain that all have in common
            last = words[-1] if words else "no answer"
            host.problems.append(f"no answer in {LONGEST_SECONDS + 20} s" if late else last)
    return found


def problems_of(host: HostReport, wanted: list[int], expected: LaunchRequirements) -> list[str]:
    """What is wrong with a host that has answered."""
    report, lines = host.report, []
    for name, here in versions().items():
        there = report["versions"].get(name)
        if there != here:
            lines.append(f"{name}: {there} there, {here} here: all hosts need the same")
    kind, count = report.get("devices", ("", None))
    if count is not None and wanted and max(wanted) >= count:
        lines.append(f"slots: device {max(wanted)} is asked for, and it has {count} {kind} device(s)")
    if abs(skew := report["time"] - host.arrived) > SKEW_SECONDS:
        lines.append(f"clock: {skew:+.0f} s from the one here; more than {SKEW_SECONDS:.0f} s apart is too much")
    if report.get("free", expected.checkpoint_bytes) < expected.checkpoint_bytes:
        need = f"a checkpoint takes about {expected.checkpoint_bytes / GIB:.3g} GiB"
        lines.append(f"disk: {expected.folder}: {report['free'] / GIB:.3g} GiB are free, and {need}")
    if report.get("data", expected.data) != expected.data:
        lines.append(
            f"data: the datasets of {expected.config} are others there (fingerprint "
            f"{_short(report['data'])} there, {_short(expected.data)} here)"
        )
    return lines


def _compare(found: list[HostReport], token: str, expected: LaunchRequirements) -> None:
    """Add what shows only beside the others: kinds of devices, a shared folder, the port of the first host."""
    kinds = {host.name: host.report["devices"][0] for host in found if "devices" in host.report}
    for host in found:
        first = next(iter(kinds), "")
        if kinds.get(host.name, kinds.get(first)) != kinds.get(first):
            host.problems.append(f"devices: {kinds[host.name]} there, {kinds[first]} on {first}: they cannot be mixed")
    if expected.folder is None:
        return
    for number, host in enumerate(found):
        answer = expected.folder / f"preflight-{number}"
        if "written" in host.report and not _says(answer, token):
            host.problems.append(f"{answer}: what the host writes is not seen here: the run folder is not shared")
    fit = [host for host in found if not host.problems]
    elsewhere = any(not is_this_host(host.name) for host in found)
    if elsewhere and len(found) > 1 and fit and not expected.master_addr and fit[0].address.startswith("127."):
        fit[0].problems.append(
            "its address for the other hosts is not known: their names do not resolve there; --master-addr says it"
        )
    for host in found:  # until one that can be the first
        if host.report.get("port_is_free") is False:
            host.problems.append(
                f"port {expected.master_port}: is taken there; the ranks meet on it: --master-port chooses another"
            )
        if not host.problems:
            break


def _says(path: Path, token: str) -> bool:
    """Whether a file arrives here; a network file system may take a moment to show it."""
    for _ in range(10):
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") == token:
                return True
        time.sleep(0.3)
    return False


def addresses_of(names: list[str]) -> list[str]:
    """The addresses of those hosts whose names are known here, without those of this host's loopback."""
    addresses = []
    for name in names:
        with contextlib.suppress(OSError):
            found = socket.getaddrinfo(name.rpartition("@")[2], None, type=socket.SOCK_DGRAM)
            addresses.append(str(found[0][4][0]))
    return [address for address in dict.fromkeys(addresses) if not address.startswith("127.") and address != "::1"]


def own_addresses(peers: list[str]) -> list[str]:
    """This host's addresses on the ways to others."""
    own = []
    for address in peers:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            probe.connect((address, DISCARD_PORT))
            own.append(str(probe.getsockname()[0]))
    return list(dict.fromkeys(own))


def _short(data: dict[str, Any]) -> str:
    return ", ".join(str(value)[:8] for value in data.values() if value)
