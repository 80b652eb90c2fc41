"""What would stop a task on many hosts, found on all of them at once, before a device is touched."""

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
from typing import Any

from lcm_ds.distributed.environment import DEFAULT_PORT
from lcm_ds.launcher.multihost.hostfile import is_this_host
from lcm_ds.launcher.multihost.launch_spec import write_private
from lcm_ds.launcher.multihost.output import OutputPrinter
from lcm_ds.launcher.multihost.pdsh import run_on_all, short_names
from lcm_ds.launcher.multihost.probe import TIMEOUT_SECONDS, route_address, versions
from lcm_ds.launcher.multihost.protocol import Listener
from lcm_ds.launcher.task import LaunchOptions, LaunchTask

MAX_CLOCK_SECONDS = 10.0
ANSWER_SECONDS = TIMEOUT_SECONDS + 20
GIB = 2**30


@dataclass
class HostReport:
    """The answer of one host, and what is wrong with it."""

    name: str
    problems: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)  # of probe.py
    received: float = 0.0  # time.time()

    @property
    def address(self) -> str:
        """The host's address for the others."""
        return str(self.report.get("address", "127.0.0.1"))

    def line(self) -> str:
        """A summary of the host."""
        if self.problems:
            count = len(self.problems)
            return f"{self.name:14} {count} problem{'s' if count > 1 else ''}"
        kind, count = self.report["devices"]
        parts = [f"Python {self.report['versions']['python']}", f"torch {self.report['versions']['torch']}"]
        parts.append(kind if count is None else f"{count} × {kind}")
        if "free" in self.report:
            parts.append(f"{self.report['free'] / GIB:.0f} GiB free")
        parts.append(f"clock {self.report['time'] - self.received:+.1f} s")
        if self.report.get("interface"):
            parts.append(f"{self.report['interface']} {self.address}")
        return f"{self.name:14} ok: {', '.join(parts)}"


async def preflight(
    task: LaunchTask,
    config: Path | None,
    hosts: Mapping[str, list[int]],
    environment: Mapping[str, str],
    options: LaunchOptions,
    listener: Listener,
    printer: OutputPrinter,
) -> list[HostReport]:
    """Check all hosts and print a line for each.

    Args:
        task: What is going to start.
        config: Its resolved config in RUN/launch, an absolute path; None without a run.
        hosts: The devices that each host is going to use.
        environment: The variables that workers are going to have.
        options: Of the launch.
        listener: To which each host connects.
        printer: For the lines.

    Returns:
        The hosts in their order, each with all its problems.
    """
    names = list(hosts)
    token = secrets.token_hex(16)
    folder = None if config is None else config.parent
    path: Path | str = "-"
    if folder is not None:
        path = folder / "preflight.json"
        peers = await asyncio.to_thread(addresses_of, names)
        questions = {
            "token": token,
            "launcher": own_addresses(peers),
            "port": listener.port,
            "peers": peers,
            "config": str(config) if task.data else None,
            "master_port": options.master_port or DEFAULT_PORT,
            "environment": dict(environment),
        }
        await asyncio.to_thread(write_private, path, json.dumps(questions))
    listener.expect(token)
    try:
        reports = await _ask(names, path, options.ssh_port)
        for host in reports:
            if host.report:
                host.problems += problems_of(host, hosts[host.name], task)
        _add_kind_problems(reports)
        if folder is not None:
            _add_folder_problems(reports, folder, token)
            _add_address_problems(reports, options)
    finally:
        listener.expect("")
        if folder is not None:
            for index in range(len(names)):
                (folder / f"preflight-{index}").unlink(missing_ok=True)
            Path(path).unlink(missing_ok=True)
    for host in reports:
        printer.say(host.line())
    return reports


def run_preflight(
    task: LaunchTask,
    config: Path | None,
    hosts: Mapping[str, list[int]],
    environment: Mapping[str, str],
    options: LaunchOptions,
) -> list[HostReport]:
    """`preflight` for a caller without an event loop, a listener and a printer."""

    async def run() -> list[HostReport]:
        printer = OutputPrinter()
        try:
            async with Listener() as listener:
                return await preflight(task, config, hosts, environment, options, listener, printer)
        finally:
            printer.close()

    return asyncio.run(run())


async def _ask(names: list[str], path: Path | str, ssh_port: int | None) -> list[HostReport]:
    """Every host's report, or why there is none."""
    reports = [HostReport(name) for name in names]
    errors: dict[str, list[str]] = {}  # on stderr, by the name that pdsh prints

    def on_line(name: str, text: str, error: bool) -> None:
        if error:
            errors.setdefault(name, []).append(text.strip())
            return
        with contextlib.suppress(ValueError, LookupError, TypeError):  # output of a login shell
            report = json.loads(text)
            host = reports[report["number"]]
            host.report, host.received = report, time.time()
            host.problems += report["problems"]

    late = False
    try:
        await asyncio.wait_for(
            run_on_all(names, "lcm_ds.launcher.multihost.probe", path, on_line, ssh_port), ANSWER_SECONDS
        )
    except asyncio.TimeoutError:
        late = True
    for host in reports:
        if not host.report:
            lines = next(filter(None, map(errors.get, short_names(host.name))), None)
            last = lines[-1] if lines else "no answer"
            host.problems.append(f"no answer in {ANSWER_SECONDS} s" if late else last)
    return reports


def problems_of(host: HostReport, devices: list[int], task: LaunchTask) -> list[str]:
    """What is wrong with a host that has answered.

    Args:
        host: Its answer.
        devices: Those that it is going to use.
        task: What is going to start.

    Returns:
        One line for each problem.
    """
    report, problems = host.report, []
    for name, here in versions().items():
        there = report["versions"].get(name)
        if there != here:
            problems.append(f"{name}: {there} there, {here} here: all hosts need the same")
    kind, count = report.get("devices", ("", None))
    if count is not None and devices and max(devices) >= count:
        problems.append(f"slots: device {max(devices)} is requested, but the host has {count} {kind} device(s)")
    if abs(offset := report["time"] - host.received) > MAX_CLOCK_SECONDS:
        problems.append(f"clock: {offset:+.0f} s from the launcher's, more than the {MAX_CLOCK_SECONDS:.0f} s allowed")
    if report.get("free", task.checkpoint_bytes) < task.checkpoint_bytes:
        need = f"a checkpoint takes about {task.checkpoint_bytes / GIB:.3g} GiB"
        problems.append(f"disk: {task.folder}: {report['free'] / GIB:.3g} GiB are free, but {need}")
    if report.get("data", task.data) != task.data:
        problems.append(
            f"data: the datasets of the config differ (fingerprint {_short(report['data'])} there, "
            f"{_short(task.data)} here)"
        )
    return problems


def _add_kind_problems(reports: list[HostReport]) -> None:
    """Hosts with another kind of devices than the first one."""
    kinds = {host.name: host.report["devices"][0] for host in reports if "devices" in host.report}
    first = next(iter(kinds), "")
    for host in reports:
        if kinds.get(host.name, kinds.get(first)) != kinds.get(first):
            host.problems.append(f"devices: {kinds[host.name]} there, {kinds[first]} on {first}: they cannot be mixed")


def _add_folder_problems(reports: list[HostReport], folder: Path, token: str) -> None:
    """Hosts whose files do not arrive in the launcher's run folder."""
    for index, host in enumerate(reports):
        answer = folder / f"preflight-{index}"
        if "written" in host.report and not _arrives(answer, token):
            host.problems.append(f"{answer}: the host's file is not visible here: the run folder is not shared")


def _add_address_problems(reports: list[HostReport], options: LaunchOptions) -> None:
    """The address and the port of the first host that can be rank 0's."""
    fit = [host for host in reports if not host.problems]
    has_remote = any(not is_this_host(host.name) for host in reports)
    if has_remote and len(reports) > 1 and fit and not options.master_addr and fit[0].address.startswith("127."):
        fit[0].problems.append(
            "its address for the other hosts is unknown, because it cannot resolve their names: give --master-addr"
        )
    for host in reports:  # until one that can be the first
        if host.report.get("port_is_free") is False:
            port = options.master_port or DEFAULT_PORT
            host.problems.append(f"port {port}: is in use there; the ranks need it: choose another with --master-port")
        if not host.problems:
            break


def _arrives(path: Path, token: str) -> bool:
    """Whether a host's file arrives here; a network file system may take a moment to show it."""
    for _ in range(10):
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") == token:
                return True
        time.sleep(0.3)
    return False


def addresses_of(names: list[str]) -> list[str]:
    """The addresses of the hosts whose names resolve here, without loopback addresses."""
    addresses = []
    for name in names:
        with contextlib.suppress(OSError):
            infos = socket.getaddrinfo(name.rpartition("@")[2], None, type=socket.SOCK_DGRAM)
            addresses.append(str(infos[0][4][0]))
    return [address for address in dict.fromkeys(addresses) if not address.startswith("127.") and address != "::1"]


def own_addresses(peers: list[str]) -> list[str]:
    """This host's addresses on the routes to others."""
    return list(dict.fromkeys(filter(None, map(route_address, peers))))


def _short(data: dict[str, Any]) -> str:
    return ", ".join(str(value)[:8] for value in data.values() if value)
