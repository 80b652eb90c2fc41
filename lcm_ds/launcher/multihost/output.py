"""What the launcher prints, without waiting for a slow terminal, and the last lines of each rank's stderr."""

from __future__ import annotations

import queue
import re
import sys
import threading
from collections import deque

MAX_QUEUED_LINES = 10_000  # for a terminal that is suspended
TAIL_LINES = 200  # of each rank's stderr
MAX_ERROR_LINES = 20
# How an error begins: Python's traceback, the worker's log, an exception without its traceback.
ERROR_START = re.compile(r"Traceback \(most recent|(ERROR|CRITICAL)\b|[\w.]*(Error|Exception)\b")
EXCEPTION = re.compile(r"[\w.]+(Error|Exception|Exit|Interrupt)\b")


class OutputPrinter:
    """Prints lines in its own thread, in order. Lines that come too fast for the terminal are dropped and counted."""

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[str, bool] | None] = queue.Queue(MAX_QUEUED_LINES)
        self._dropped = 0
        self._thread = threading.Thread(target=self._print, daemon=True)
        self._thread.start()

    def say(self, text: str, error: bool = False) -> None:
        """Print a line on stdout or on stderr."""
        try:
            if self._dropped:
                self._queue.put_nowait((f"lcm-ds launch: {self._dropped} lines are only in the logs", True))
                self._dropped = 0
            self._queue.put_nowait((text, error))
        except queue.Full:
            self._dropped += 1

    def close(self, timeout: float = 10.0) -> None:
        """Print what is queued, for `timeout` seconds at most."""
        try:
            self._queue.put(None, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(timeout)

    def _print(self) -> None:
        while (item := self._queue.get()) is not None:
            text, error = item
            try:
                print(text, file=sys.stderr if error else sys.stdout, flush=True)
            except (OSError, ValueError):
                continue  # the reader has gone, which does not end a run


class StderrTail:
    """The last lines of a rank's stderr."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)

    def add(self, line: str) -> None:
        """Add a line."""
        self._lines.append(line)

    def first_error(self) -> list[str]:
        """The first error, without the middle of a long one; the last lines if none looks like an error."""
        lines = list(self._lines)
        start = next((index for index, line in enumerate(lines) if ERROR_START.match(line)), None)
        if start is None:
            return lines[-MAX_ERROR_LINES:]
        # A traceback continues to the exception itself, a line that is not indented.
        after = range(start + 1, len(lines))
        end = next((index for index in after if EXCEPTION.match(lines[index])), start + MAX_ERROR_LINES - 1)
        error = lines[start : end + 1]
        return error if len(error) <= MAX_ERROR_LINES else [error[0], "  …", *error[-(MAX_ERROR_LINES - 2) :]]
