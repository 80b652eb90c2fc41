"""One start of a task's workers on many hosts: from pdsh until the last of them has ended.

Promises: one worker that fails, or one host that is lost, ends all others; the first failure is reported.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lcm_ds.distributed.workers import PATIENCE_SECONDS
from lcm_ds.launcher.multihost import protocol
from lcm_ds.launcher.multihost.launch_spec import Host, LaunchSpec
from lcm_ds.launcher.multihost.output import OutputPrinter, StderrTail
from lcm_ds.launcher.multihost.pdsh import CONNECT_SECONDS, run_on_all, short_names
from lcm_ds.launcher.multihost.signals import StopSignals
from lcm_ds.signals import DONE, FAILED, STOPPED, describe_exit, exit_code, failure_priority

START_SECONDS = 60.0  # for Python to start on all hosts, after ssh has connected
SIMULTANEOUS_SECONDS = 0.5  # of failures this close together, the one that explains most is reported


@dataclass(frozen=True)
class Failure:
    """What ended a start."""

    origin: str  # a host, a rank, or the launcher
    message: str
    code: int  # that the launcher exits with
    priority: tuple[bool, bool] = (True, False)
    log: Path | None = None
    error_lines: list[str] = field(default_factory=list)
    time: float = field(default_factory=time.monotonic)

    def report(self) -> list[str]:
        """The lines that the user sees last: the error itself, where it came from, and the log with the rest."""
        log = "" if self.log is None else f"; its log: {self.log}"
        return [*self.error_lines, f"lcm-ds launch: {self.origin} {self.message}{log}"]


class Supervisor:
    """The launcher's view of the hosts of one start."""

    def __init__(self, spec: LaunchSpec, printer: OutputPrinter) -> None:
        self.spec, self.printer = spec, printer
        self.writers: dict[int, asyncio.StreamWriter] = {}  # of connected hosts, by their index
        self.stderr: dict[int, StderrTail] = defaultdict(StderrTail)  # of each rank
        self.ssh_stderr: dict[str, StderrTail] = defaultdict(StderrTail)  # of each host
        self.failures: list[Failure] = []
        self.stopped = False  # by a signal to the launcher
        self.ended: set[int] = set()  # hosts that are done or lost
        self.changed = asyncio.Event()

    async def run(
        self, path: Path, listener: protocol.Listener, signals: StopSignals, ssh_port: int | None
    ) -> Failure | None:
        """Start the workers and wait until all have ended.

        Args:
            path: The file for the hosts to read, removed at the end.
            listener: Accepts their connections.
            signals: To the launcher.
            ssh_port: Of all hosts; default: ssh's own configuration.

        Returns:
            The first failure, None if all ended well.
        """
        self.spec.write(path)
        listener.expect(self.spec.token, self.serve)
        signals.send = self.send_all
        names = [host.name for host in self.spec.hosts]
        pdsh = asyncio.create_task(run_on_all(names, "lcm_ds.launcher.multihost.agent", path, self.on_pdsh, ssh_port))
        pdsh.add_done_callback(lambda _: self.changed.set())
        try:
            await self.await_connections(pdsh)
            if signals.count and not self.failures:
                self.fail(Failure("the launcher", "was asked to stop before a worker was started", STOPPED))
            if not self.failures:  # else closing the connections ends the hosts
                self.send_all({"do": "start"})
                await self.wait_for(lambda: bool(self.failures) or len(self.ended) == len(names))
                # The hosts end themselves as well: those that do not answer by then are cut off.
                await self.wait_for(lambda: len(self.ended) == len(names), self.shutdown_seconds())
                self.stopped = signals.count > 0
        finally:
            signals.send = None
            listener.expect("")
            for writer in self.writers.values():
                writer.close()
            pdsh.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await pdsh
            path.unlink(missing_ok=True)
        return self.first_failure

    @property
    def first_failure(self) -> Failure | None:
        """The failure that came first. A 75 explains nothing unless the launcher was asked to stop: ranks that are
        still starting exit with it when another failure ends them.
        """
        failures = [failure for failure in self.failures if failure.code != STOPPED]
        if self.stopped or not failures:
            failures = self.failures
        simultaneous = [failure for failure in failures if failure.time < failures[0].time + SIMULTANEOUS_SECONDS]
        return min(simultaneous, key=lambda failure: failure.priority, default=None)

    def shutdown_seconds(self) -> float:
        """The time after the first failure in which every host that is alive has ended."""
        patience = PATIENCE_SECONDS.get(self.failures[0].code, 0.0) if self.failures else 0.0
        return patience + self.spec.heartbeat_timeout + self.spec.grace + 10.0

    async def wait_for(self, condition: Callable[[], bool], timeout: float = float("inf")) -> None:
        """Wait until a condition holds, for `timeout` seconds at most."""
        deadline = time.monotonic() + timeout
        while not condition() and (left := deadline - time.monotonic()) > 0:
            self.changed.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.changed.wait(), min(left, 3600.0))

    async def await_connections(self, pdsh: asyncio.Task[int]) -> None:
        """Wait until all hosts have connected; those that do not are failures."""
        count = len(self.spec.hosts)
        await self.wait_for(lambda: len(self.writers) == count or pdsh.done(), CONNECT_SECONDS + START_SECONDS)
        for index, host in enumerate(self.spec.hosts):
            if index not in self.writers:
                lines = next(filter(None, (self.ssh_stderr[name].first_error() for name in short_names(host.name))), [])
                self.ended.add(index)
                self.fail(Failure(host.name, "could not be started", FAILED, error_lines=lines))

    # --- one host -----------------------------------------------------------------------------------------------------

    async def serve(self, index: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read a host's messages until its connection ends."""
        if index in self.writers or not 0 <= index < len(self.spec.hosts) or index in self.ended:
            return
        self.writers[index] = writer
        self.changed.set()
        host, done = self.spec.hosts[index], False
        loss = "is gone: its connection is closed"
        heartbeat = asyncio.create_task(protocol.send_heartbeats(writer, self.spec.heartbeat_timeout))
        try:
            while not done and (message := await protocol.read(reader, self.spec.heartbeat_timeout)):
                done = self.on_message(host, message)
        except protocol.PeerTimeout:
            loss = f"is lost: no heartbeat for {self.spec.heartbeat_timeout:g} s"
        finally:
            heartbeat.cancel()
            self.ended.add(index)
            if not done:
                self.fail(Failure(host.name, loss, FAILED))
            self.changed.set()

    def on_message(self, host: Host, message: protocol.Message) -> bool:
        """Handle a host's message; returns whether it was its last one."""
        match message:
            case {"rank": int(rank), "line": str(line), "error": bool(error)}:
                if error:
                    self.stderr[rank].add(line)
                self.printer.say(f"{host.name} rank {rank}: {line}", error)
            case {"rank": int(rank), "ended": int(code)} if code != DONE:
                self.fail(
                    Failure(
                        f"{host.name} rank {rank}",
                        describe_exit(code),
                        exit_code(code),
                        failure_priority(code),
                        self.spec.log(rank),
                        self.stderr[rank].first_error(),
                    )
                )
        return message == {"done": True}

    def on_pdsh(self, host: str, text: str, error: bool) -> None:
        """Print a line of ssh, or of Python before it has connected."""
        self.ssh_stderr[host].add(text)
        self.printer.say(f"{host}: {text}", error)

    # --- all hosts ----------------------------------------------------------------------------------------------------

    def fail(self, failure: Failure) -> None:
        """Note a failure; the first one ends all workers."""
        self.failures.append(failure)
        if len(self.failures) == 1:
            patience = min(self.spec.grace, PATIENCE_SECONDS.get(failure.code, 0.0))
            self.send_all({"do": "end", "after": patience})
        self.changed.set()

    def send_all(self, message: protocol.Message) -> None:
        """Send a message to every connected host."""
        for index in self.writers.keys() - self.ended:
            protocol.write(self.writers[index], message)
