"""The connection between the launcher and each host of a run: lines of JSON over TCP, with heartbeats both ways.

A host opens it with the token from the launcher's file. Each end considers the other dead after `heartbeat_timeout`
seconds without a line, so both notice a cut link, a dead host and a killed launcher.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

LINE_LIMIT = 1 << 20  # bytes of one message
ANSWER_SECONDS = 5.0  # for the launcher to accept a host
HEARTBEATS_PER_TIMEOUT = 5

Message = dict[str, Any]
Handler = Callable[[int, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class PeerTimeout(Exception):
    """No heartbeat has come in time."""


def write(writer: asyncio.StreamWriter, message: Message) -> None:
    """Send a message without waiting; does nothing if the connection is closed."""
    if not writer.is_closing():
        writer.write(json.dumps(message).encode() + b"\n")


async def read(reader: asyncio.StreamReader, heartbeat_timeout: float) -> Message | None:
    """The next message that is not a heartbeat, None if the peer has closed the connection. Raises PeerTimeout."""
    while True:
        try:
            line = await asyncio.wait_for(reader.readline(), heartbeat_timeout)
        except (TimeoutError, asyncio.TimeoutError):
            raise PeerTimeout from None
        except (OSError, ValueError):
            return None
        if not line.endswith(b"\n"):
            return None
        if message := json.loads(line):
            return dict(message)


async def send_heartbeats(writer: asyncio.StreamWriter, heartbeat_timeout: float) -> None:
    """Send heartbeats until cancelled."""
    while True:
        write(writer, {})
        await asyncio.sleep(heartbeat_timeout / HEARTBEATS_PER_TIMEOUT)


def connect(addresses: Iterable[str], port: int, token: str, index: int) -> socket.socket:
    """Connect a host to the launcher.

    Args:
        addresses: Of the launcher, tried one after the other.
        port: The launcher's.
        token: Of this start.
        index: The host's, among all hosts.

    Returns:
        The connection to the first address at which the launcher answers.

    Raises:
        ConnectionError: no address works; the message has the reason for each.
    """
    failures = []
    for address in dict.fromkeys(addresses):
        try:
            connection = socket.create_connection((address, port), timeout=ANSWER_SECONDS)
            with contextlib.ExitStack() as on_failure:
                on_failure.enter_context(connection)
                connection.sendall(json.dumps({"token": token, "host": index}).encode() + b"\n")
                if connection.recv(1) == b"\n":
                    connection.settimeout(None)
                    on_failure.pop_all()
                    return connection
            failures.append(f"{address} port {port}: not this launcher")
        except OSError as error:
            failures.append(f"{address} port {port}: {error.strerror or error}")
    raise ConnectionError("; ".join(failures) or "no address of the launcher is known")


def addresses_to_try(launcher_addresses: Iterable[str]) -> list[str]:
    """The launcher's possible addresses as seen from a host: the origin of its ssh connection first."""
    return [*os.environ.get("SSH_CONNECTION", "").split()[:1], *launcher_addresses]


def _listen_on_free_port() -> socket.socket:
    """Listen on all addresses of this host, IPv6 and IPv4 if it has both."""
    with contextlib.suppress(OSError):
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


class Listener:
    """The launcher's end: passes connections with the right token to a handler."""

    def __init__(self) -> None:
        self.port = 0
        self._token = ""
        self._handler: Handler | None = None
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Listener:
        self._server = await asyncio.start_server(self._accept, sock=_listen_on_free_port(), limit=LINE_LIMIT)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exception: object) -> None:
        assert self._server is not None
        self._server.close()

    def expect(self, token: str, handler: Handler | None = None) -> None:
        """From now on accept only hosts with this token. Without a handler they only get an answer."""
        self._token, self._handler = token, handler

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            hello = await read(reader, ANSWER_SECONDS)
            if hello is None or not hmac.compare_digest(str(hello.get("token")), self._token):
                return
            writer.write(b"\n")
            if self._handler is not None:
                await self._handler(int(hello["host"]), reader, writer)
        except (PeerTimeout, OSError, ValueError, TypeError):
            pass  # a client that does not speak this protocol
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
