"""`python -m lcm_ds.launcher.multihost.agent FILE INDEX`: one host of a run, started by the launcher through pdsh.

It starts its workers on the launcher's request and forwards their output. It ends them when one of them fails, when the
launcher asks for it, and when the launcher is gone.
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

from lcm_ds.distributed.workers import POLL_SECONDS, Workers, threads_per_worker
from lcm_ds.errors import InputError
from lcm_ds.launcher.multihost import protocol
from lcm_ds.launcher.multihost.hostfile import visible_devices
from lcm_ds.launcher.multihost.launch_spec import LaunchSpec

MAX_LINE = 8192  # bytes; a longer line is sent in pieces
DRAIN_SECONDS = 3.0  # for the output of workers to arrive after they have ended


class HostAgent:
    """This host's workers and its connection to the launcher."""

    def __init__(self, spec: LaunchSpec, index: int) -> None:
        self.spec, self.host = spec, spec.hosts[index]
        self.workers = Workers(spec.grace)
        self.started = asyncio.Event()
        self.error: OSError | InputError | None = None  # why workers could not be started
        self.readers: list[list[asyncio.Task[None]]] = []  # of each worker's stdout and stderr
        self.reports: list[asyncio.Task[None]] = []

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        """From the launcher's request to start until all workers have ended; returns their exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.workers.send_signal, signal.SIGTERM)
        self.writer = writer
        background = [
            loop.create_task(protocol.send_heartbeats(writer, self.spec.heartbeat_timeout)),
            loop.create_task(self.serve(reader)),
        ]
        try:
            await self.started.wait()
            if self.error is not None:
                raise self.error
            if not self.workers.processes:
                return 1
            while not self.workers.all_exited:
                for local_rank, code in self.workers.poll().items():
                    self.reports.append(loop.create_task(self.report(local_rank, code)))
                await asyncio.sleep(POLL_SECONDS)
            await asyncio.wait(self.reports, timeout=2 * DRAIN_SECONDS)
            protocol.write(writer, {"done": True})
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(writer.drain(), DRAIN_SECONDS)
            return self.workers.exit_code
        finally:
            self.workers.kill()
            for task in background:
                task.cancel()
            writer.close()

    async def serve(self, reader: asyncio.StreamReader) -> None:
        """Carry out the launcher's requests until it is gone."""
        try:
            while message := await protocol.read(reader, self.spec.heartbeat_timeout):
                match message:
                    case {"do": "start"}:
                        for local_rank in range(len(self.host.devices)):
                            self.start(local_rank)
                        self.started.set()
                    case {"do": "stop"}:
                        self.workers.send_signal(signal.SIGTERM)
                    case {"do": "end", "after": seconds}:
                        self.workers.terminate(seconds)
                    case {"do": "kill"}:
                        self.workers.kill()
            self.workers.terminate()  # the launcher has exited; the workers may save
        except protocol.PeerTimeout:
            # The other hosts are cut off, too: nothing can be saved, and the run may continue without this host.
            self.workers.kill()
        except (OSError, InputError) as error:  # no memory for a worker, no room for its log, not its devices
            self.workers.kill()
            self.error = error
        self.started.set()

    def start(self, local_rank: int) -> None:
        """Start one worker and read its output."""
        env = self.spec.dist_env(self.host, local_rank)
        command = [sys.executable, "-u", "-m", self.spec.module, self.spec.config]
        worker = self.workers.start(command, self.environment(), env, output=subprocess.PIPE)
        log = self.spec.log(env.rank).open("ab", buffering=0)
        log.write(f"--- {time.strftime('%F %T')}: rank {env.rank} on {self.host.name}\n".encode())
        streams = ((worker.stdout, False), (worker.stderr, True))
        self.readers.append([asyncio.create_task(self.forward(pipe, log, env.rank, error)) for pipe, error in streams])

    async def forward(self, pipe: IO[bytes] | None, log: BinaryIO, rank: int, error: bool) -> None:
        """Write a worker's output to its log and send it to the launcher, line by line.

        Args:
            pipe: Its stdout or stderr.
            log: Of both.
            rank: The worker's.
            error: Whether it is stderr.
        """
        reader = asyncio.StreamReader()
        stream = asyncio.StreamReaderProtocol(reader)
        await asyncio.get_running_loop().connect_read_pipe(lambda: stream, pipe)
        rest = b""
        while chunk := await reader.read(1 << 16):
            with contextlib.suppress(OSError):  # a full disk does not stop a worker
                await asyncio.to_thread(log.write, chunk)  # a slow disk does not hold up the heartbeats
            *lines, rest = re.split(rb"[\r\n]+", rest + chunk)
            if len(rest) > MAX_LINE:
                lines, rest = [*lines, rest], b""
            for line in filter(None, lines):
                self.send_line(rank, line, error)
            with contextlib.suppress(OSError):
                await self.writer.drain()
        if rest:
            self.send_line(rank, rest, error)

    def send_line(self, rank: int, line: bytes, error: bool) -> None:
        """Send a line to the launcher."""
        protocol.write(self.writer, {"rank": rank, "line": line.decode("utf-8", "replace"), "error": error})

    async def report(self, local_rank: int, code: int) -> None:
        """Tell the launcher that a worker has ended, after the last line of its output."""
        await asyncio.wait(self.readers[local_rank], timeout=DRAIN_SECONDS)
        protocol.write(self.writer, {"rank": self.host.first_rank + local_rank, "ended": code})

    def environment(self) -> dict[str, str]:
        """A worker's variables: this host's, the launcher's, and those for its devices and network interface."""
        environ = {**os.environ, **self.spec.environment}
        if self.host.visible is not None:
            environ["CUDA_VISIBLE_DEVICES"] = self.host.visible
        environ["CUDA_VISIBLE_DEVICES"] = visible_devices(self.host.name, self.host.devices, environ)
        environ.setdefault("OMP_NUM_THREADS", threads_per_worker(len(self.host.devices)))
        if self.host.interface is not None:
            environ.setdefault("NCCL_SOCKET_IFNAME", f"={self.host.interface}")  # without =, eth1 also matches eth10
            environ.setdefault("GLOO_SOCKET_IFNAME", self.host.interface)
        return environ


async def _run(spec: LaunchSpec, index: int) -> int:
    addresses = protocol.addresses_to_try(spec.launcher_addresses)
    connection = protocol.connect(addresses, spec.launcher_port, spec.token, index)
    reader, writer = await asyncio.open_connection(sock=connection, limit=protocol.LINE_LIMIT)
    return await HostAgent(spec, index).run(reader, writer)


def main(arguments: list[str]) -> int:
    """Run the host with this index; returns its workers' exit code."""
    path, index = Path(arguments[0]), int(arguments[1])
    try:
        return asyncio.run(_run(LaunchSpec.read(path), index))
    except (OSError, InputError) as error:  # the file or the launcher is gone, or workers could not be started
        print(f"lcm-ds launch: {path}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
