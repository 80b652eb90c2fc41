"""A run on many hosts, from the first preflight to its end: starts, and further starts after failures.

Nothing that another start cannot help is tried again: a mistake (2), a stop on request (75), a run that makes no
progress. Hosts that fail a preflight after a failure are left out, and come back when they pass one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lcm_ds.distributed.workers import LONGEST_BACK_OFF_SECONDS, STOPPED
from lcm_ds.errors import InputError
from lcm_ds.launcher.multihost.launch_spec import Host, LaunchSpec
from lcm_ds.launcher.multihost.output import OutputPrinter
from lcm_ds.launcher.multihost.preflight import HostReport, LaunchRequirements, addresses_of, own_addresses, preflight
from lcm_ds.launcher.multihost.protocol import BEATS, Listener
from lcm_ds.launcher.multihost.signals import Stopping
from lcm_ds.launcher.multihost.supervisor import Failure, Supervisor


@dataclass(frozen=True)
class LaunchOptions:
    """How a run on many hosts is started and watched. Times are in seconds."""

    max_restarts: int = 0
    min_hosts: int | None = None  # that a restart needs; None: all
    back_off: float = 10.0  # before the first restart; twice as long before each further one
    silence: float = 15.0  # without a sign of life, after which a host is lost
    grace: float = 30.0  # between SIGTERM and SIGKILL
    master_addr: str | None = None
    master_port: int | None = None
    ssh_port: int | None = None

    def errors(self, hosts: int) -> list[str]:
        """What is wrong with it, one line each."""
        lines = []
        if self.max_restarts < 0:
            lines.append(f"--max-restarts {self.max_restarts}: has to be 0 or more")
        if self.min_hosts is not None and not 1 <= self.min_hosts <= hosts:
            lines.append(f"--min-hosts {self.min_hosts}: has to be from 1 to {hosts}, the number of hosts")
        for option, value in (("back-off", self.back_off), ("silence", self.silence), ("grace", self.grace)):
            if value <= 0:
                lines.append(f"--{option} {value:g}: has to be more than 0 seconds")
        if self.master_port is not None and not 0 < self.master_port < 2**16:
            lines.append(f"--master-port {self.master_port}: has to be from 1 to 65535")
        return lines

    def of_hosts_alone(self, local: bool) -> list[str]:
        """The options in it that mean nothing without a hostfile; with `local` processes some do all the same."""
        everywhere = ("master_addr", "master_port", *(("max_restarts", "back_off", "grace") if local else ()))
        defaults = LaunchOptions()
        names = [field.name for field in dataclasses.fields(self) if field.name not in everywhere]
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) != getattr(defaults, name)]


DEFAULTS = LaunchOptions()


@dataclass(frozen=True)
class Work:
    """What is started on the hosts."""

    module: str
    config: Path  # resolved, where every host reads it
    expected: LaunchRequirements
    environment: dict[str, str]  # of the workers
    stop_file: Path | None  # None: they stop on SIGTERM
    progress: Callable[[], int]  # how far it has come: a number that grows
    divides: Callable[[int], bool]  # whether so many ranks can share the work


def run_on_hosts(work: Work, hosts: Mapping[str, list[int]], origin: str | Path, settings: LaunchOptions) -> int:
    """Run the work on hosts of `origin`, each with its devices; returns the exit code, the workers' own.

    Raises InputError where a host is not fit for it at the first start.
    """
    return asyncio.run(_run(work, hosts, origin, settings))


async def _run(work: Work, hosts: Mapping[str, list[int]], origin: str | Path, settings: LaunchOptions) -> int:
    screen = OutputPrinter()
    stopping = Stopping(work.stop_file, screen)
    try:
        async with Listener() as listener:
            return await _Run(work, dict(hosts), origin, settings, screen, stopping, listener).to_the_end()
    finally:
        stopping.close()
        screen.close()


def share(devices: Sequence[int], divides: Callable[[int], bool], least: int) -> int:
    """How many of these hosts, from the first on, can share the work: as many as possible, 0 for fewer than `least`.

    With as many devices on each this is the most ranks that there can be.
    """
    counts = (count for count in range(len(devices), least - 1, -1) if divides(sum(devices[:count])))
    return next(counts, 0)


@dataclass
class _Run:
    """One call of the launcher."""

    work: Work
    hosts: dict[str, list[int]]
    origin: str | Path
    settings: LaunchOptions
    screen: OutputPrinter
    stopping: Stopping
    listener: Listener
    restarts: int = 0
    failed_at: int | None = None  # how far the work had come at the last failure
    last: list[str] = field(default_factory=list)  # what the user sees last

    async def to_the_end(self) -> int:
        """Start after start; returns the exit code."""
        while not self.stopping.level:
            chosen = await self.preflight()
            if self.stopping.level:
                break
            if chosen:
                try:
                    failure = await self.start(chosen)
                except OSError as error:  # a file server that is away
                    failure = Failure("the launcher", f"could not start the hosts: {error}", 1)
                if failure is None or failure.code == STOPPED:
                    return failure.code if failure else 0
                self.last = failure.told()
                if failure.code == 2 or self.stopping.level or not await self.made_progress():
                    self.tell_last()
                    return failure.code
            if self.restarts >= self.settings.max_restarts:
                self.tell_last()
                return 1
            self.restarts += 1
            await self.back_off()
        return STOPPED

    async def preflight(self) -> list[HostReport]:
        """The hosts of the next start; none where too few are fit.

        Raises InputError where any host is not fit for the first start.
        """
        found = await preflight(
            self.hosts,
            self.work.expected,
            self.work.environment,
            self.listener,
            self.screen,
            self.settings.ssh_port,
        )
        problems = [f"{self.origin}: {host.name}: {text}" for host in found for text in host.problems]
        if problems and not self.restarts:
            raise InputError(problems)
        self.last += problems
        return self.choose([host for host in found if not host.problems])

    def choose(self, fit: Sequence[HostReport]) -> list[HostReport]:
        """As many of the fit hosts, in their order, as can share the work; none where they are too few."""
        least = self.settings.min_hosts or len(self.hosts)
        devices = [len(self.hosts[host.name]) for host in fit]
        count = share(devices, self.work.divides, least)
        if count:
            if left_out := sorted(self.hosts.keys() - {host.name for host in fit[:count]}):
                ranks = sum(devices[:count])
                self.say(f"goes on with {ranks} rank(s) on {count} host(s), without {', '.join(left_out)}")
            return list(fit[:count])
        fewer = f"{len(fit)} of {len(self.hosts)} hosts are fit: a restart needs {least}"
        if len(fit) >= least:
            fewer += ", with a number of ranks that can share the rows of a step"
        self.last.append(f"lcm-ds launch: {fewer}")
        return []

    async def start(self, chosen: Sequence[HostReport]) -> Failure | None:
        """One start on these hosts; returns what ended it, None where all ended well."""
        hosts, rank = [], 0
        for found in chosen:
            devices = self.hosts[found.name]
            hosts.append(Host(found.name, devices, rank, found.report.get("interface")))
            rank += len(devices)
        assert self.work.expected.folder is not None
        job = LaunchSpec(
            token=secrets.token_hex(16),
            launcher=own_addresses(await asyncio.to_thread(addresses_of, [host.name for host in chosen])),
            port=self.listener.port,
            silence=self.settings.silence,
            grace=self.settings.grace,
            module=self.work.module,
            config=str(self.work.config),
            environment=self.work.environment,
            master_addr=self.settings.master_addr or chosen[0].address,
            master_port=self.work.expected.master_port,
            hosts=hosts,
        )
        cluster = Supervisor(job, self.screen)
        await cluster.run(
            self.work.expected.folder / "start.json", self.listener, self.stopping, self.settings.ssh_port
        )
        return cluster.failure

    async def made_progress(self) -> bool:
        """Whether the work has come further since the last failure, if there was one."""
        before = self.failed_at
        try:
            self.failed_at = await asyncio.to_thread(self.work.progress)
        except OSError:
            return True  # it cannot be told now
        if before is not None and self.failed_at <= before:
            self.last.append(f"lcm-ds launch: no progress since the last restart (at {before}): not started again")
            return False
        return True

    async def back_off(self) -> None:
        """Say what failed and wait before the next start."""
        seconds = min(self.settings.back_off * 2 ** (self.restarts - 1), LONGEST_BACK_OFF_SECONDS)
        # A host that was lost ends its workers by itself, a heartbeat later than it is noticed here at the latest.
        seconds = max(seconds, 2 * self.settings.silence / BEATS)
        self.tell_last()
        self.say(f"restart {self.restarts} of {self.settings.max_restarts} in {seconds:g} s")
        await self.stopping.sleep(seconds)

    def tell_last(self) -> None:
        """Print what is known of the failure."""
        for line in self.last:
            self.screen.say(line, error=True)
        self.last = []

    def say(self, text: str) -> None:
        """Tell the user."""
        self.screen.say(f"lcm-ds launch: {text}", error=True)
