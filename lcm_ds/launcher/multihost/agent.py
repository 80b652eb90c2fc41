"""`python -m lcm_ds.launcher.multihost.agent FILE NUMBER`: one host of a run. The launcher starts it through pdsh.

It starts its workers when the launcher says so, sends what they say, and ends them when one of them fails, when the
launcher asks for it, and when nothing is heard of the launcher any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, BinaryIO

from lcm_ds.distributed.workers import POLL_SECONDS, Workers, threads_each
from lcm_ds.launcher.multihost import protocol
from lcm_ds.launcher.multihost.launch_spec import LaunchSpec

LONGEST_LINE = 8192  # bytes; what is longer is sent in pieces
LAST_WORDS_SECONDS = 3.0  # for what workers said to arrive after they have ended


class HostAgent:
    """This host's workers and its connection to the launcher."""

    def __init__(self, job: LaunchSpec, number: int) -> None:
        self.job, self.host = job, job.hosts[number]
        self.workers = Workers(job.grace)
        self.started = asyncio.Event()
        self.trouble: OSError | None = None  # why workers could not be started
        self.pumps: list[list[asyncio.Task[None]]] = []  # of each worker, for its two streams
        self.reports: list[asyncio.Task[None]] = []

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        """From the launcher's word to start to the end of all workers; returns their exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.workers.send_signal, signal.SIGTERM)
        self.writer = writer
        always = [
            loop.create_task(protocol.beat(writer, self.job.silence)),
            loop.create_task(self.listen(reader)),
        ]
        try:
            await self.started.wait()
            if self.trouble is not None:
                raise self.trouble
            if not self.workers.processes:
                return 1
            while not self.workers.gone():
                for local_rank, code in self.workers.look().items():
                    self.reports.append(loop.create_task(self.report(local_rank, code)))
                await asyncio.sleep(POLL_SECONDS)
            await asyncio.wait(self.reports, timeout=2 * LAST_WORDS_SECONDS)
            protocol.write(writer, {"done": True})
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(writer.drain(), LAST_WORDS_SECONDS)
            return self.workers.code()
        finally:
            self.workers.kill()
            for task in always:
                task.cancel()
            writer.close()

    async def listen(self, reader: asyncio.StreamReader) -> None:
        """Do what the launcher says, until nothing is heard of it any more."""
        try:
            while message := await protocol.read(reader, self.job.silence):
                match message:
                    case {"do": "start"}:
                        for local_rank in range(len(self.host.devices)):
                            self.start(local_rank)
                        self.started.set()
                    case {"do": "stop"}:
                        self.workers.send_signal(signal.SIGTERM)
                    case {"do": "end", "after": seconds}:
                        self.workers.end(seconds)
                    case {"do": "kill"}:
                        self.workers.kill()
            self.workers.end()  # the launcher has ended; the workers may save
        except protocol.PeerTimeout:
            # Cut off from the others, too: nothing can be saved, and the run may go on without this host.
            self.workers.kill()
        except OSError as error:  # no memory for a worker, no room for its log
            self.workers.kill()
            self.trouble = error
        self.started.set()

    def start(self, local_rank: int) -> None:
        """Start one worker and what carries away what it says."""
        place = self.job.place(self.host, local_rank)
        command = [sys.executable, "-u", "-m", self.job.module, self.job.config]
        worker = self.workers.start(command, self.environment(), place, output=subprocess.PIPE)
        log = self.job.log(place.rank).open("ab", buffering=0)
        log.write(f"--- {time.strftime('%F %T')}: rank {place.rank} on {self.host.name}\n".encode())
        self.pumps.append(
            [
                asyncio.create_task(self.pump(pipe, log, place.rank, error))
                for pipe, error in ((worker.stdout, False), (worker.stderr, True))
            ]
        )

    async def pump(self, pipe: IO[bytes] | None, log: BinaryIO, rank: int, error: bool) -> None:
        """Keep what a worker says in its log and send it to the launcher, line by line."""
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, pipe)
        rest = b""
        while piece := await reader.read(1 << 16):
            with contextlib.suppress(OSError):  # a full disk is no reason for a worker to stand still
                await asyncio.to_thread(log.write, piece)  # a slow one is none for the heartbeat
            *lines, rest = re.split(rb"[\r\n]+", rest + piece)
            if len(rest) > LONGEST_LINE:
                lines, rest = [*lines, rest], b""
            for line in filter(None, lines):
                self.say(rank, line, error)
            with contextlib.suppress(OSError):
                await self.writer.drain()
        if rest:
            self.say(rank, rest, error)

    def say(self, rank: int, line: bytes, error: bool) -> None:
        """Send a line to the launcher."""
        protocol.write(self.writer, {"rank": rank, "line": line.decode("utf-8", "replace"), "error": error})

    async def report(self, local_rank: int, code: int) -> None:
        """Tell the launcher that a worker has ended, after all that it has said."""
        await asyncio.wait(self.pumps[local_rank], timeout=LAST_WORDS_SECONDS)
        protocol.write(self.writer, {"rank": self.host.first_rank + local_rank, "ended": code})

    def environment(self) -> dict[str, str]:
        """A worker's variables: this host's, the launcher's, and what follows from its devices and its interface."""
        chosen = {**os.environ, **self.job.environment}
        chosen["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.host.devices))
        chosen.setdefault("OMP_NUM_THREADS", threads_each(len(self.host.devices)))
        if self.host.interface is not None:
            chosen.setdefault("NCCL_SOCKET_IFNAME", f"={self.host.interface}")  # "eth1" would mean eth10, too
            chosen.setdefault("GLOO_SOCKET_IFNAME", self.host.interface)
        return chosen


async def _run(job: LaunchSpec, number: int) -> int:
    connection = protocol.connect(protocol.launcher_addresses(job.launcher), job.port, job.token, number)
    reader, writer = await asyncio.open_connection(sock=connection, limit=protocol.LINE_LIMIT)
    return await HostAgent(job, number).run(reader, writer)


def main(arguments: list[str]) -> int:
    """Run the host of that number; returns its workers' exit code."""
    path, number = Path(arguments[0]), int(arguments[1])
    try:
        return asyncio.run(_run(LaunchSpec.read(path), number))
    except OSError as error:  # no file, or no launcher any more
        print(f"lcm-ds launch: {path}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
