"""Requests to stop: a signal to any process of any rank, or the file RUN/STOP."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers that this process was asked to stop; the ranks agree on it at the next step (see loop.py).

    A second SIGINT stops the process at once.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._file: Path | None = None
        self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.reason = signal.Signals(number).name

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
