"""How processes end, children with their parents; and what else Linux is asked for: freed memory, who holds a file."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import NoReturn

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# File systems whose files processes of other machines may hold, and when a lock on one of them is taken for left over.
SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "weka", "9p", "fuse")
LEFT_OVER_SECONDS = 600.0
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


def set_parent_death_signal(number: int = signal.SIGKILL, parent: int | None = None) -> Callable[[], None]:
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


def exit_with_parent(every: float = 1.0) -> None:
    """Have this process kill itself when the one that started it has ended; looked for every so many seconds.

    For children of programs that cannot be told to call `set_parent_death_signal`, nor trusted to start them from a
    thread that lasts.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every)
        os.kill(os.getpid(), signal.SIGKILL)

    Thread(target=watch, name="lcm-ds-parent", daemon=True).start()


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """Run a program's main and end the process with the code it returns, without taking the interpreter apart.

    While Python does that, a thread of C++ that asks for the interpreter is ended where it stands: gloo's may hold a
    tensor of the last collective. Then it says "terminate called without an active exception", and SIGABRT is what a
    worker ends with that did its work well. What is registered with `atexit` meanwhile is called as ever.
    """
    code: int | None = 1  # where main ends with an error

    def leave() -> None:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                stream.flush()
        os._exit(code or 0)

    atexit.register(leave)  # the first one is called last, when the threads of Python have ended
    try:
        code = main()
    except SystemExit as ended:  # argparse's
        code = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
        raise
    sys.exit(code)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is allocated next; does nothing with another C library.

    A training step frees and allocates the same large tensors again and again. By default each comes fresh from the
    kernel, which costs a page fault every 4 KiB: a quarter of a step on two cores.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def remove_left_over_locks(folder: Path) -> list[Path]:
    """Remove the `lock` files of torch's JIT builds in `folder` that nobody holds; returns them.

    Who compiles an extension makes such a file, keeps it open and removes it; everybody else waits until it is gone,
    for ever where that process was killed. On a file system that machines share a holder cannot be seen: there a lock
    has to be ten minutes old.
    """
    locks = [*folder.glob("*/lock"), *folder.glob("*/*/lock")]
    held = set(_open_files()) if locks else set()
    removed = []
    for lock in locks:
        with contextlib.suppress(OSError):  # released just now
            shared = _file_system(lock).startswith(SHARED)
            if str(lock.resolve()) not in held and (
                not shared or time.time() - lock.stat().st_mtime > LEFT_OVER_SECONDS
            ):
                lock.unlink()
                removed.append(lock)
    return removed


def _open_files() -> Iterator[str]:
    """What the processes that can be seen have open."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            yield os.readlink(descriptor)


def _file_system(path: Path) -> str:
    """The type of the file system that a path lies on."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    resolved = path.resolve()
    return max((len(point), kind) for point, kind in mounts if resolved.is_relative_to(point))[1]
