"""Signals to the launcher: the first asks the run to save and stop, the second ends it, the third kills it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from pathlib import Path

from lcm_ds.launcher.multihost.output import OutputPrinter
from lcm_ds.launcher.multihost.protocol import Message
from lcm_ds.signals import STOP_SIGNALS, TOUCH_SECONDS, StopFile


class StopSignals:
    """Counts the stop signals and answers them.

    The first one becomes the file RUN/STOP, if the workers obey it, else a SIGTERM to each of them.
    """

    def __init__(self, stop_path: Path | None, printer: OutputPrinter) -> None:
        self.count = 0
        self.received = asyncio.Event()
        self.send: Callable[[Message], None] | None = None  # to all hosts of a run; None while there is none
        self._stop_file = None if stop_path is None else StopFile(stop_path)
        self._printer = printer
        self._touching: asyncio.Task[None] | None = None
        for number in STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        self.count += 1
        self.received.set()
        answers = {
            1: "the ranks save and stop at the next step; a second signal ends them within --grace",
            2: "the workers are being ended; a third signal kills them",
        }
        text = answers.get(self.count, "the workers are killed")
        self._printer.say(f"lcm-ds launch: {signal.Signals(number).name}: {text}", error=True)
        if self.send is None:
            return
        if self.count > 1:
            self.send({"do": "end", "after": 0.0} if self.count == 2 else {"do": "kill"})
        elif self._stop_file is not None:
            self._touching = asyncio.create_task(_keep_touching(self._stop_file))
        else:
            self.send({"do": "stop"})

    async def sleep(self, seconds: float) -> None:
        """Wait, but only until the first signal."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.received.wait(), seconds)

    def close(self) -> None:
        """Remove the handlers, and a stop file that no rank has answered."""
        for number in STOP_SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)
        if self._touching is not None and self._stop_file is not None:
            self._touching.cancel()
            self._stop_file.remove()


async def _keep_touching(file: StopFile) -> None:
    while True:
        await asyncio.to_thread(file.touch)  # a slow file server does not hold up the heartbeats
        await asyncio.sleep(TOUCH_SECONDS)
