"""A task on many hosts, from the first preflight to its end, with restarts after failures.

It is not restarted if that cannot help: after invalid input (2), after a stop on request (75), and without progress.
Hosts that fail a preflight after a failure are left out until they pass one.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lcm_ds.distributed.environment import DEFAULT_PORT
from lcm_ds.distributed.events import events
from lcm_ds.errors import InputError
from lcm_ds.launcher.multihost.hostfile import is_this_host
from lcm_ds.launcher.multihost.launch_spec import Host, LaunchSpec
from lcm_ds.launcher.multihost.output import OutputPrinter
from lcm_ds.launcher.multihost.preflight import HostReport, addresses_of, own_addresses, preflight
from lcm_ds.launcher.multihost.protocol import HEARTBEATS_PER_TIMEOUT, Listener
from lcm_ds.launcher.multihost.signals import StopSignals
from lcm_ds.launcher.multihost.supervisor import Failure, Supervisor
from lcm_ds.launcher.schedulers import environment_of_workers
from lcm_ds.launcher.task import LaunchOptions, LaunchTask
from lcm_ds.signals import DONE, FAILED, STOPPED, USER_ERROR

MAX_BACKOFF_SECONDS = 300.0


def run_on_hosts(
    task: LaunchTask, config: Path, hosts: Mapping[str, list[int]], hostfile: str | Path, options: LaunchOptions
) -> int:
    """Run a task on many hosts.

    Args:
        task: What is started.
        config: Its resolved config, in RUN/launch, which all hosts can read. An absolute path.
        hosts: The devices of each host.
        hostfile: Where they come from, for messages.
        options: How they are watched and restarted.

    Returns:
        The workers' exit code.

    Raises:
        InputError: a host is unfit before the first start.
    """

    async def run() -> int:
        printer = OutputPrinter()
        signals = StopSignals(task.stop_file, printer)
        try:
            async with Listener() as listener:
                return await _Launch(task, config, dict(hosts), hostfile, options, printer, signals, listener).run()
        finally:
            signals.close()
            printer.close()

    return asyncio.run(run())


def fitting_hosts(devices: Sequence[int], can_share: Callable[[int], bool], min_hosts: int) -> int:
    """The largest number of hosts, from the first on, whose ranks can share the work.

    If all hosts have equally many devices, this uses as many ranks as possible.

    Args:
        devices: The number of devices of each host.
        can_share: Whether a number of ranks can share the work.
        min_hosts: The least number of hosts.

    Returns:
        The number of hosts, 0 if it would be below `min_hosts`.
    """
    counts = (count for count in range(len(devices), min_hosts - 1, -1) if can_share(sum(devices[:count])))
    return next(counts, 0)


@dataclass
class _Launch:
    """One call of the launcher: `run_on_hosts` has the arguments."""

    task: LaunchTask
    config: Path
    hosts: dict[str, list[int]]
    hostfile: str | Path
    options: LaunchOptions
    printer: OutputPrinter
    signals: StopSignals
    listener: Listener
    environment: dict[str, str] = field(default_factory=lambda: environment_of_workers(os.environ))
    restarts: int = 0
    waits: int = 0  # restarts in a row without progress: too few hosts were fit, or it is not known
    slow: set[str] = field(default_factory=set)  # hosts of stragglers
    failed_at: int | None = None  # the progress at the last failure
    last: list[str] = field(default_factory=list)  # the lines that the user sees last

    async def run(self) -> int:
        """Start the workers, again after failures; returns the exit code."""
        while not self.signals.count:
            chosen = await self.preflight()
            if self.signals.count:
                break
            if chosen:
                try:
                    failure = await self.start(chosen)
                except OSError as error:  # an unreachable file server
                    failure = Failure("the launcher", f"could not start the hosts: {error}", FAILED)
                if failure is None or failure.code == STOPPED:
                    return failure.code if failure else DONE
                self.last = failure.report()
                log = None if failure.log is None else str(failure.log)
                events.emit("failure", origin=failure.origin, message=failure.message, code=failure.code, log=log)
                if failure.code == USER_ERROR or self.signals.count or not await self.made_progress():
                    self.print_last()
                    return failure.code
            if self.restarts >= self.options.max_restarts:
                self.print_last()
                return FAILED
            await self.back_off()
        return STOPPED

    async def preflight(self) -> list[HostReport]:
        """Check all hosts; returns those for the next start, none if too few are fit.

        Raises InputError if any host is unfit before the first start.
        """
        reports = await preflight(
            self.task, self.config, self.hosts, self.environment, self.options, self.listener, self.printer
        )
        problems = [f"{self.hostfile}: {host.name}: {text}" for host in reports for text in host.problems]
        if problems and not self.restarts:
            raise InputError(problems)
        self.last += problems
        return self.choose([host for host in reports if not host.problems])

    def choose(self, fit: Sequence[HostReport]) -> list[HostReport]:
        """As many of the fit hosts, in their order, as can share the work; none if they are too few."""
        min_hosts = self.options.min_hosts or len(self.hosts)
        quick = [host for host in fit if host.name not in self.slow]
        for hosts in (quick, fit):  # without stragglers if that leaves enough
            devices = [len(self.hosts[host.name]) for host in hosts]
            if count := fitting_hosts(devices, self.task.can_share, min_hosts):
                fit = hosts
                break
        if count:
            if excluded := sorted(self.hosts.keys() - {host.name for host in fit[:count]}):
                ranks, names = sum(devices[:count]), ", ".join(excluded)
                text = f"lcm-ds launch: continuing with {ranks} rank(s) on {count} host(s), without {names}"
                self.printer.say(text, error=True)
            return list(fit[:count])
        problem = f"{len(fit)} of {len(self.hosts)} hosts are fit: a restart needs {min_hosts}"
        if len(fit) >= min_hosts:
            problem += ", with a number of ranks that can share the rows of a step"
        self.last.append(f"lcm-ds launch: {problem}")
        return []

    async def start(self, chosen: Sequence[HostReport]) -> Failure | None:
        """Start the workers on these hosts once; returns what ended them, None if all ended well."""
        hosts, rank = [], 0
        for host in chosen:
            devices = self.hosts[host.name]
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") if is_this_host(host.name) else None  # ssh drops it
            hosts.append(Host(host.name, devices, rank, host.report.get("interface"), visible))
            rank += len(devices)
        spec = LaunchSpec(
            token=secrets.token_hex(16),
            launcher_addresses=own_addresses(await asyncio.to_thread(addresses_of, [host.name for host in chosen])),
            launcher_port=self.listener.port,
            heartbeat_timeout=self.options.silence,
            grace=self.options.grace,
            module=self.task.module,
            config=str(self.config),
            environment=self.environment,
            master_addr=self.options.master_addr or chosen[0].address,
            master_port=self.options.master_port or DEFAULT_PORT,
            hosts=hosts,
        )
        events.emit("start", folder=str(self.task.folder), ranks=rank, hosts={h.name: h.devices for h in hosts})
        path = self.config.with_name("start.json")
        before = len(self.task.stragglers())
        failure = await Supervisor(spec, self.printer).run(path, self.listener, self.signals, self.options.ssh_port)
        if self.options.exclude_stragglers:
            ranks = self.task.stragglers()[before:]
            self.slow |= {
                host.name for host in hosts for rank in ranks if 0 <= rank - host.first_rank < len(host.devices)
            }
        return failure

    async def made_progress(self) -> bool:
        """Whether the work has advanced since the previous failure, if there was one."""
        previous = self.failed_at
        try:
            self.failed_at = await asyncio.to_thread(self.task.progress)
        except OSError:
            return True  # unknown for now
        if previous is not None and self.failed_at <= previous:
            self.last.append(f"lcm-ds launch: no progress since the last restart (at {previous}): giving up")
            return False
        self.waits = 0
        return True

    async def back_off(self) -> None:
        """Report the failure and wait before the next start."""
        seconds = min(self.options.back_off * 2**self.waits, max(MAX_BACKOFF_SECONDS, self.options.back_off))
        self.restarts, self.waits = self.restarts + 1, self.waits + 1
        # A host that was lost kills its workers at most one heartbeat after the launcher has noticed.
        seconds = max(seconds, 2 * self.options.silence / HEARTBEATS_PER_TIMEOUT)
        self.print_last()
        most, progress = self.options.max_restarts, self.failed_at
        events.emit("restart", number=self.restarts, of=most, seconds=seconds, progress=progress)
        text = f"lcm-ds launch: restart {self.restarts} of {self.options.max_restarts} in {seconds:g} s"
        self.printer.say(text, error=True)
        await self.signals.sleep(seconds)

    def print_last(self) -> None:
        """Print what is known of the failure."""
        for line in self.last:
            self.printer.say(line, error=True)
        self.last = []
