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

    def __init__(self, run_dir: Path, watch_file: bool) -> None:
        self.file = run_dir / "STOP"
        self.reason: str | None = None
        self._watch_file = watch_file
        self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.reason = signal.Signals(number).name

    def requested(self) -> bool:
        """Whether this process knows of a request."""
        if self.reason is None and self._watch_file and self.file.exists():
            self.reason = f"the file {self.file}"
        return self.reason is not None

    def close(self) -> None:
        """Put the process's former signal handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
