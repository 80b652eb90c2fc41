"""The connection between the launcher and each host of a run: lines of JSON over TCP, with heartbeats both ways.

A host opens it with the token of the launcher's file. Whoever hears nothing for `silence` seconds takes the
other for dead, so a cut link, a dead host and a killed launcher are all noticed at both ends.
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
ANSWER_SECONDS = 5.0  # for the launcher to say welcome
BEATS = 5  # heartbeats in the time after which silence means death

Message = dict[str, Any]
Handler = Callable[[int, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class PeerTimeout(Exception):
    """The other end has said nothing for too long."""


def write(writer: asyncio.StreamWriter, message: Message) -> None:
    """Send one message, without waiting for it to be gone; does nothing where the connection is closed."""
    if not writer.is_closing():
        writer.write(json.dumps(message).encode() + b"\n")


async def read(reader: asyncio.StreamReader, silence: float) -> Message | None:
    """The next message that is no heartbeat, None where the other end has closed.

    Raises Silent after so many seconds without a sign of life.
    """
    while True:
        try:
            line = await asyncio.wait_for(reader.readline(), silence)
        except (TimeoutError, asyncio.TimeoutError):
            raise PeerTimeout from None
        except (OSError, ValueError):
            return None
        if not line.endswith(b"\n"):
            return None
        if message := json.loads(line):
            return dict(message)


async def beat(writer: asyncio.StreamWriter, silence: float) -> None:
    """Send heartbeats until it is cancelled."""
    while True:
        write(writer, {})
        await asyncio.sleep(silence / BEATS)


def connect(addresses: Iterable[str], port: int, token: str, number: int) -> socket.socket:
    """A host's connection to the launcher, at the first address where it answers.

    Raises ConnectionError, which says what happened at each.
    """
    failures = []
    for address in dict.fromkeys(addresses):
        try:
            connection = socket.create_connection((address, port), timeout=ANSWER_SECONDS)
        except OSError as error:
            failures.append(f"{address} port {port}: {error.strerror or error}")
            continue
        try:
            connection.sendall(json.dumps({"token": token, "host": number}).encode() + b"\n")
            if connection.recv(1) == b"\n":
                connection.settimeout(None)
                return connection
            failures.append(f"{address} port {port}: not this launcher")
        except OSError as error:
            failures.append(f"{address} port {port}: {error.strerror or error}")
        connection.close()
    raise ConnectionError("; ".join(failures) or "no address of the launcher is known")


def launcher_addresses(known: Iterable[str]) -> list[str]:
    """Where this process, on a host, may find the launcher: where ssh came from, then the addresses it says it has."""
    came_from = os.environ.get("SSH_CONNECTION", "").split()[:1]
    return [*came_from, *known]


def _any_port() -> socket.socket:
    """Listens at all addresses of this host, IPv6 and IPv4 where there are both."""
    with contextlib.suppress(OSError):
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


class Listener:
    """The launcher's end: hands connections with the right token to whoever expects them."""

    def __init__(self) -> None:
        self.port = 0
        self._token = ""
        self._handler: Handler | None = None
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Listener:
        self._server = await asyncio.start_server(self._accept, sock=_any_port(), limit=LINE_LIMIT)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exception: object) -> None:
        assert self._server is not None
        self._server.close()

    def expect(self, token: str, handler: Handler | None = None) -> None:
        """From now on answer those with this token, and no others. Without a handler the answer is all they get."""
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
            pass  # somebody who does not speak this
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
