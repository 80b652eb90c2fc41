"""Requests to stop: a signal to any process of any rank, or the file RUN/STOP."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from threading import Thread
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPED = 75


class StopRequest:
    """Remembers that this process was asked to stop; the ranks agree on it at the next step (see loop.py).

    Until `steps_begin` there is nothing to save, and a signal ends the process at once, whatever it waits for, with
    exit code 75. Later a second SIGINT ends it.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._starting = True
        self._file: Path | None = None
        self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        # Python's handlers run when the main thread comes back from what it waits for; this is told at once.
        self._told, told = os.pipe()
        os.set_blocking(told, False)
        self._tells = signal.set_wakeup_fd(told, warn_on_full_buffer=False), told
        self._thread = Thread(target=self._listen, name="lcm-ds-stop", daemon=True)
        self._thread.start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.reason = signal.Signals(number).name

    def _listen(self) -> None:
        while numbers := os.read(self._told, 16):
            if self._starting and set(numbers) & set(SIGNALS):
                sys.stdout.flush()
                os._exit(STOPPED)

    def steps_begin(self) -> None:
        """From now on a request is answered by all ranks together."""
        self._starting = False

    def watch(self, file: Path) -> None:
        """Take the file for a request, from now on; one that is there is left over and goes."""
        self._file = file
        self.clear()

    def clear(self) -> None:
        """Take the file away."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def requested(self) -> bool:
        """Whether this process knows of a request."""
        if self.reason is None and self._file is not None and self._file.exists():
            self.reason = f"the file {self._file}"
        return self.reason is not None

    def close(self) -> None:
        """Put the process's former signal handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        before, told = self._tells
        signal.set_wakeup_fd(before)
        os.close(told)
        self._thread.join()
        os.close(self._told)
