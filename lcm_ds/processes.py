"""What Linux is asked for: children that do not outlive their parent, memory that a process keeps."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


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


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is allocated next; does nothing with another C library.

    A training step frees and allocates the same large tensors again and again. By default each comes fresh from the
    kernel, which costs a page fault every 4 KiB: a quarter of a step on two cores.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
