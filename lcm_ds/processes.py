"""Child processes that do not outlive the process that started them."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with_parent(number: int = signal.SIGKILL, parent: int | None = None) -> Callable[[], None]:
    """For the child to call first (`preexec_fn`): the kernel sends it this signal when its parent ends.

    More exactly, when the thread that started it ends: start such children from a thread that lasts. parent: the
    parent's process number, where this is called in the child.
    """
    libc, parent = ctypes.CDLL(None, use_errno=True), parent or os.getpid()

    def set_death_signal() -> None:
        libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the line above
            os.kill(os.getpid(), number)

    return set_death_signal
