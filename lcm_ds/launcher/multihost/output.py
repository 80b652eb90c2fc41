"""What the launcher prints, and what it remembers of it: nothing that it does waits for a terminal."""

from __future__ import annotations

import queue
import re
import sys
import threading
from collections import deque

WAITING_LINES = 10_000  # what a terminal that stands still may leave waiting
REMEMBERED = 200  # lines on stderr of each rank
SHOWN = 20  # of a rank's error
# How an error begins: Python's own words, the worker's log, an exception without its traceback.
BEGINS = re.compile(r"Traceback \(most recent|(ERROR|CRITICAL)\b|[\w.]*(Error|Exception)\b")


class OutputPrinter:
    """Prints lines in a thread of its own, in order. Those that a terminal is too slow for are left out and counted."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[tuple[str, bool] | None] = queue.Queue(WAITING_LINES)
        self._left_out = 0
        self._thread = threading.Thread(target=self._print, daemon=True)
        self._thread.start()

    def say(self, text: str, error: bool = False) -> None:
        """Print a line on stdout or on stderr."""
        try:
            if self._left_out:
                self._waiting.put_nowait((f"lcm-ds launch: {self._left_out} lines are in the logs alone", True))
                self._left_out = 0
            self._waiting.put_nowait((text, error))
        except queue.Full:
            self._left_out += 1

    def close(self, patience: float = 10.0) -> None:
        """Print what waits, for so many seconds at most."""
        try:
            self._waiting.put(None, timeout=patience)
        except queue.Full:
            return
        self._thread.join(patience)

    def _print(self) -> None:
        while (item := self._waiting.get()) is not None:
            text, error = item
            try:
                print(text, file=sys.stderr if error else sys.stdout, flush=True)
            except (OSError, ValueError):
                continue  # nobody reads it any more, which does not end a run


class StderrTail:
    """The last lines that a rank has said on stderr."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=REMEMBERED)

    def add(self, line: str) -> None:
        """Remember one more."""
        self._lines.append(line)

    def first(self) -> list[str]:
        """The first error among them, or the last lines where none looks like one; a long one without its middle."""
        lines = list(self._lines)
        begins = next((number for number, line in enumerate(lines) if BEGINS.match(line)), None)
        if begins is None:
            return lines[-SHOWN:]
        # A traceback goes on until a line that is not indented: the exception itself.
        ends = next((n for n in range(begins + 1, len(lines)) if _is_exception(lines[n])), begins + SHOWN - 1)
        found = lines[begins : ends + 1]
        return found if len(found) <= SHOWN else [found[0], "  …", *found[-(SHOWN - 2) :]]


def _is_exception(line: str) -> bool:
    return re.match(r"[\w.]+(Error|Exception|Exit|Interrupt)\b", line) is not None
