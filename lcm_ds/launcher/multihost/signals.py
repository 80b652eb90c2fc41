"""Signals to the launcher: the first asks the run to save and stop, the second ends it, the third kills it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from pathlib import Path

from lcm_ds.launcher.multihost.output import OutputPrinter
from lcm_ds.launcher.multihost.protocol import Message

TOUCH_SECONDS = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopping:
    """How far the launcher was asked to end what it has started.

    The first request becomes the file RUN/STOP, at which all ranks save and end with 75, where the workers look for it.
    It is made again and again: a run that is about to begin takes one for left over, and away.
    """

    def __init__(self, stop_file: Path | None, screen: OutputPrinter) -> None:
        self.level = 0
        self.asked = asyncio.Event()
        self.file = stop_file
        self.tell: Callable[[Message], None] | None = None  # sends a message to all hosts of a run
        self._screen = screen
        self._asking: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        self.level += 1
        self.asked.set()
        if self.level == 1 and self.file is not None and self.tell is not None:  # else nothing of ours runs there
            self._asking = asyncio.create_task(_touch_again_and_again(self.file))
        says = {
            1: "the ranks save and stop at the next step; once more ends them within the grace",
            2: "the workers are ended; once more kills them",
        }
        text = says.get(self.level, "the workers are killed")
        self._screen.say(f"lcm-ds launch: {signal.Signals(number).name}: {text}", error=True)
        if self.tell is not None and self.level > 1:
            self.tell({"do": "end", "after": 0.0} if self.level == 2 else {"do": "kill"})
        elif self.tell is not None and self.file is None:
            self.tell({"do": "stop"})

    async def sleep(self, seconds: float) -> None:
        """Wait so long, or until the first request."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.asked.wait(), seconds)

    def close(self) -> None:
        """Take back the handlers, and a request that nobody has answered: the next start is not to find it."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.remove_signal_handler(number)
        if self._asking is not None and self.file is not None:
            self._asking.cancel()
            self.file.unlink(missing_ok=True)


async def _touch_again_and_again(file: Path) -> None:
    while True:
        with contextlib.suppress(OSError):
            await asyncio.to_thread(file.touch)  # a file server that is away does not stop the heartbeats
        await asyncio.sleep(TOUCH_SECONDS)
