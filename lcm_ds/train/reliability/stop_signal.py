"""Requests to stop a rank: a signal, or the file RUN/STOP."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from threading import Thread

from lcm_ds.signals import STOP_SIGNALS, STOPPED, on_stop_signal


class StopRequest:
    """Remembers that this process was asked to stop; the ranks agree on it at the next step (see loop.py).

    Until `steps_begin` there is nothing to save: a signal ends the process at once, whatever it waits for, with exit
    code 75. After that a second SIGINT ends it, also while the main thread waits in C code.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._starting = True
        self._file: Path | None = None
        self._restore_handlers = on_stop_signal(self._on_signal)
        # Python runs its handlers once the main thread returns from C code, and then once for all signals of a kind;
        # the wake-up pipe gets a byte for each at once.
        self._pipe, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        self._previous_wakeup, self._wakeup = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False), wakeup
        self._thread = Thread(target=self._listen, name="lcm-ds-stop", daemon=True)
        self._thread.start()

    def _on_signal(self, number: int) -> None:
        self.reason = signal.Signals(number).name

    def _listen(self) -> None:
        interrupts = 0
        while numbers := os.read(self._pipe, 16):
            if self._starting and set(numbers) & set(STOP_SIGNALS):
                sys.stdout.flush()
                os._exit(STOPPED)
            interrupts += numbers.count(signal.SIGINT)
            if interrupts > 1:
                # By the signal itself, as shells expect; Python sets handlers in the main thread only.
                ctypes.CDLL(None).signal(ctypes.c_int(signal.SIGINT), ctypes.c_void_p(int(signal.SIG_DFL)))
                os.kill(os.getpid(), signal.SIGINT)

    def steps_begin(self) -> None:
        """From now on all ranks answer a request together."""
        self._starting = False

    def watch(self, file: Path) -> None:
        """From now on treat the file as a request; one that exists already is a leftover and is removed."""
        self._file = file
        self.clear()

    def clear(self) -> None:
        """Remove the file."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def requested(self) -> bool:
        """Whether this process knows of a request."""
        if self.reason is None and self._file is not None and self._file.exists():
            self.reason = f"the file {self._file}"
        return self.reason is not None

    def close(self) -> None:
        """Restore the previous signal handlers."""
        self._restore_handlers()
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._wakeup)
        self._thread.join()
        os.close(self._pipe)
