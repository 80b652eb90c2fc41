"""Ends a run that hangs, with the stacks of all threads of every rank in the log."""

from __future__ import annotations

import faulthandler
import logging
import os
import tempfile
import time
from threading import Event, Thread

from lcm_ds.train.monitoring.console import console

logger = logging.getLogger("lcm_ds.train")

# After the limit and this long, a timer ends a process that no longer runs Python.
LAST_RESORT_SECONDS = 30.0
# Between a rank's log and its exit, which ends the others: they stand at the same step and log theirs in this time.
OTHERS_SECONDS = 3.0


class Watchdog:
    """Ends this process with exit code 1 if `beat` is not called for `minutes`; None: never.

    Each rank has one, and logs its stacks. If the log cannot be written, or the interpreter itself hangs, they go to
    stderr half a minute later.
    """

    def __init__(self, minutes: float | None) -> None:
        self._limit = None if minutes is None else 60 * minutes
        self._doing = "starting"
        self._beaten = time.monotonic()
        self._ended = Event()
        if self._limit is not None:
            self._thread = Thread(target=self._watch, args=(self._limit,), name="lcm-ds-watchdog", daemon=True)
            self.beat(self._doing)
            self._thread.start()

    def beat(self, doing: str) -> None:
        """Report progress: the process now does `doing`."""
        self._doing, self._beaten = doing, time.monotonic()
        if self._limit is not None:
            faulthandler.dump_traceback_later(self._limit + LAST_RESORT_SECONDS, exit=True, file=console.err)

    def close(self) -> None:
        """Stop watching."""
        self._ended.set()
        if self._limit is not None:
            faulthandler.cancel_dump_traceback_later()
            self._thread.join()

    def _watch(self, limit: float) -> None:
        while not self._ended.wait(max(0.1, self._beaten + limit - time.monotonic())):
            if time.monotonic() - self._beaten >= limit:
                text = f"{self._doing}: no progress for {limit / 60:g} minutes (guard.stall_minutes), exiting"
                logger.error("%s; all threads, most recent call first:\n%s", text, stacks())
                logging.shutdown()
                time.sleep(OTHERS_SECONDS)
                os._exit(1)


def stacks() -> str:
    """The stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
