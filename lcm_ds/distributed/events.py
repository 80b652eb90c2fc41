"""`lcm-ds launch --json`: what happens to the workers, a line of JSON for each event, for programs that watch them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from typing import Any


class Events:
    """Writes events, once `take_stdout` was called; before that it does nothing."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def take_stdout(self) -> None:
        """Write events to stdout, and all that this process and its children print from now on to stderr."""
        sys.stdout.flush()
        self._descriptor = os.dup(1)  # not inherited
        os.dup2(2, 1)

    def emit(self, event: str, **fields: Any) -> None:
        """Write an event.

        Args:
            event: Its name: start, failure, restart, end.
            **fields: What JSON can hold; those that are None are left out.
        """
        if self._descriptor is None:
            return
        known = {name: value for name, value in fields.items() if value is not None}
        line = json.dumps({"time": round(time.time(), 3), "event": event, **known})
        with contextlib.suppress(OSError):  # the reader has gone, which does not end a run
            os.write(self._descriptor, f"{line}\n".encode())


events = Events()
