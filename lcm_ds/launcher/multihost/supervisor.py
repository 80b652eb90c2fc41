"""One start of a run's workers on many hosts: from pdsh to the last of them gone.

Promises: one worker that fails, or one host that is lost, ends the workers on all others; it is told which came first.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lcm_ds.distributed.workers import PATIENCE_SECONDS, STOPPED, describe_exit, exit_code, precedence
from lcm_ds.launcher.multihost import protocol
from lcm_ds.launcher.multihost.launch_spec import Host, LaunchSpec
from lcm_ds.launcher.multihost.output import OutputPrinter, StderrTail
from lcm_ds.launcher.multihost.pdsh import CONNECT_SECONDS, on_hosts
from lcm_ds.launcher.multihost.signals import Stopping

APPEAR_SECONDS = 60.0  # for Python to start on all hosts, after ssh has connected
TOGETHER_SECONDS = 0.5  # failures so close are taken for one, and the one that explains most is told


@dataclass(frozen=True)
class Failure:
    """What ended a start."""

    who: str
    what: str
    code: int  # of the launcher
    order: tuple[bool, bool] = (True, False)
    log: Path | None = None
    lines: list[str] = field(default_factory=list)
    at: float = field(default_factory=time.monotonic)

    def told(self) -> list[str]:
        """What the user sees last: what was said, then who said it and where the rest is."""
        where = "" if self.log is None else f"; its log: {self.log}"
        return [*self.lines, f"lcm-ds launch: {self.who} {self.what}{where}"]


class Supervisor:
    """The hosts of one start, as the launcher sees them."""

    def __init__(self, job: LaunchSpec, screen: OutputPrinter) -> None:
        self.job, self.screen = job, screen
        self.writers: dict[int, asyncio.StreamWriter] = {}
        self.errors: dict[int, StderrTail] = defaultdict(StderrTail)  # of each rank
        self.said: dict[str, StderrTail] = defaultdict(StderrTail)  # of each host's ssh
        self.failures: list[Failure] = []
        self.stopped = False  # by the launcher
        self.gone: set[int] = set()  # hosts that are done, or lost
        self.changed = asyncio.Event()

    async def run(self, path: Path, listener: protocol.Listener, stopping: Stopping, ssh_port: int | None) -> None:
        """Start the workers and wait until all are gone; `failure` says how it went. path: the job's file."""
        self.job.write(path)
        listener.expect(self.job.token, self.serve)
        stopping.tell = self.send_all
        names = [host.name for host in self.job.hosts]
        pdsh = asyncio.create_task(on_hosts(names, "lcm_ds.launcher.multihost.agent", path, self.on_pdsh, ssh_port))
        pdsh.add_done_callback(lambda _: self.changed.set())
        try:
            await self.appear(pdsh)
            if stopping.level and not self.failures:
                self.fail(Failure("the launcher", "was asked to stop before a worker was started", STOPPED))
                return  # with the connections the hosts end
            if self.failures:
                return
            self.send_all({"do": "start"})
            await self.until(lambda: bool(self.failures) or len(self.gone) == len(names))
            # They end themselves, too: who does not answer by then is cut off.
            await self.until(lambda: len(self.gone) == len(names), self.longest_end())
            self.stopped = stopping.level > 0
        finally:
            stopping.tell = None
            listener.expect("")
            for writer in self.writers.values():
                writer.close()
            pdsh.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await pdsh
            path.unlink(missing_ok=True)

    @property
    def failure(self) -> Failure | None:
        """What came first, None where all ended well. A stop that nobody asked the launcher for explains no failure:
        ranks that still start end with 75 when they are told to end.
        """
        failures = [failure for failure in self.failures if failure.code != STOPPED]
        if self.stopped or not failures:
            failures = self.failures
        together = [failure for failure in failures if failure.at < failures[0].at + TOGETHER_SECONDS]
        return min(together, key=lambda failure: failure.order, default=None)

    def longest_end(self) -> float:
        """Seconds after the first failure by which every host that is still there has ended."""
        patience = PATIENCE_SECONDS.get(self.failures[0].code, 0.0) if self.failures else 0.0
        return patience + self.job.silence + self.job.grace + 10.0

    async def until(self, done: Callable[[], bool], seconds: float = float("inf")) -> None:
        """Wait for something to be so, for so long at most."""
        deadline = time.monotonic() + seconds
        while not done() and (left := deadline - time.monotonic()) > 0:
            self.changed.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.changed.wait(), min(left, 3600.0))

    async def appear(self, pdsh: asyncio.Task[int]) -> None:
        """Wait until all hosts have connected; those that do not are failures."""
        count = len(self.job.hosts)
        await self.until(lambda: len(self.writers) == count or pdsh.done(), CONNECT_SECONDS + APPEAR_SECONDS)
        for number, host in enumerate(self.job.hosts):
            if number not in self.writers:
                label = host.name.rpartition("@")[2]
                # pdsh cuts a domain that all hosts have in common
                lines = self.said[label].first() or self.said[label.partition(".")[0]].first()
                self.gone.add(number)
                self.fail(Failure(host.name, "could not be started", 1, lines=lines))

    # --- one host -----------------------------------------------------------------------------------------------------

    async def serve(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Listen to a host from its first word to its last."""
        if number in self.writers or not 0 <= number < len(self.job.hosts) or number in self.gone:
            return
        self.writers[number] = writer
        self.changed.set()
        host, done = self.job.hosts[number], False
        lost = "is gone: its connection is closed"
        beating = asyncio.create_task(protocol.beat(writer, self.job.silence))
        try:
            while not done and (message := await protocol.read(reader, self.job.silence)):
                done = self.on_message(host, message)
        except protocol.PeerTimeout:
            lost = f"is lost: no sign of life for {self.job.silence:g} s"
        finally:
            beating.cancel()
            self.gone.add(number)
            if not done:
                self.fail(Failure(host.name, lost, 1))
            self.changed.set()

    def on_message(self, host: Host, message: protocol.Message) -> bool:
        """Take in what a host says; returns whether it was its last word."""
        match message:
            case {"rank": int(rank), "line": str(line), "error": bool(error)}:
                if error:
                    self.errors[rank].add(line)
                self.screen.say(f"{host.name} rank {rank}: {line}", error)
            case {"rank": int(rank), "ended": int(code)} if code != 0:
                who, log = f"{host.name} rank {rank}", self.job.log(rank)
                self.fail(
                    Failure(who, describe_exit(code), exit_code(code), precedence(code), log, self.errors[rank].first())
                )
        return message == {"done": True}

    def on_pdsh(self, host: str, text: str, error: bool) -> None:
        """What ssh says, or Python before it is connected."""
        self.said[host].add(text)
        self.screen.say(f"{host}: {text}", error)

    # --- all hosts ----------------------------------------------------------------------------------------------------

    def fail(self, failure: Failure) -> None:
        """Note a failure; the first one ends all workers."""
        self.failures.append(failure)
        if len(self.failures) == 1:
            patience = min(self.job.grace, PATIENCE_SECONDS.get(failure.code, 0.0))
            self.send_all({"do": "end", "after": patience})
        self.changed.set()

    def send_all(self, message: protocol.Message) -> None:
        """Tell every host that is there."""
        for number in self.writers.keys() - self.gone:
            protocol.write(self.writers[number], message)
