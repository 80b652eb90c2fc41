"""Requests to stop, by a signal or by the file RUN/STOP, and what exit codes mean."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from pathlib import Path

# Exit codes of all commands and processes. STOPPED: on request, with everything saved; the same command resumes.
DONE, FAILED, USER_ERROR, STOPPED = 0, 1, 2, 75
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TOUCH_SECONDS = 1.0  # between two touches of RUN/STOP


def exit_code(returncode: int) -> int:
    """A worker's exit code as its launcher passes it on: everything that has no meaning of its own becomes 1."""
    return returncode if returncode in (DONE, USER_ERROR, STOPPED) else FAILED


def describe_exit(returncode: int) -> str:
    """How a process ended, in words."""
    if returncode < 0:
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"ended with exit code {returncode}"


def failure_priority(returncode: int) -> tuple[bool, bool]:
    """Sorts simultaneous failures: invalid input explains why the others failed, a stop explains nothing."""
    return returncode != USER_ERROR, returncode == STOPPED


def on_stop_signal(handler: Callable[[int], object]) -> Callable[[], None]:
    """Call `handler` with the number of each stop signal that this process gets. Call it from the main thread.

    Returns a function that restores the previous handlers.
    """
    previous = {number: signal.signal(number, lambda number, _: handler(number)) for number in STOP_SIGNALS}

    def restore() -> None:
        for number, former in previous.items():
            signal.signal(number, former)

    return restore


class StopFile:
    """RUN/STOP, with which a launcher asks all ranks to save and exit with 75.

    A run that starts removes the file as a leftover, so a launcher has to repeat its request.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def touch(self) -> None:
        """Make the file; an unreachable file server does not end the launcher."""
        with contextlib.suppress(OSError):
            self.path.touch()

    def remove(self) -> None:
        """Withdraw a request that no rank has answered, so that the next start does not find it."""
        self.path.unlink(missing_ok=True)
