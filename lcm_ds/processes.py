"""Linux: children that end with their parents, a clean exit, processors, freed memory, who holds a lock file."""

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
# File systems whose files other machines may hold open, and the age at which a lock on one of them is stale.
SHARED_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "weka", "9p", "fuse")
STALE_SECONDS = 600.0
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


def warn_of_few_cores(threads: int) -> None:
    """Tell the user if workers that compute with so many threads, all together, share fewer processors."""
    cores = len(os.sched_getaffinity(0))
    if threads > cores:
        text = f"warning: {threads} workers (or threads) slow each other down on {cores} processor(s); use {cores}"
        print(text, file=sys.stderr, flush=True)


def set_parent_death_signal(number: int = signal.SIGKILL, parent: int | None = None) -> Callable[[], None]:
    """Return what a child calls first (`preexec_fn`), so that the kernel sends it a signal when its parent ends.

    More exactly, when the thread that started it ends: start such children from a thread that lasts. `parent` is the
    parent's PID, needed if this is called in the child.
    """
    libc, parent = ctypes.CDLL(None, use_errno=True), parent or os.getpid()

    def set_death_signal() -> None:
        libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:  # the parent ended before the line above
            os.kill(os.getpid(), number)

    return set_death_signal


def exit_with_parent(every: float = 1.0) -> None:
    """Have this process kill itself after its parent has ended, which it checks every `every` seconds.

    For children of programs that neither call `set_parent_death_signal` nor start them from a thread that lasts.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every)
        os.kill(os.getpid(), signal.SIGKILL)

    Thread(target=watch, name="lcm-ds-parent", daemon=True).start()


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """Run a program's main and exit with the code that it returns, without finalizing the interpreter.

    Finalization ends each C++ thread that asks for the interpreter: gloo's may hold a tensor of the last collective.
    A worker that did its work well would then print "terminate called without an active exception" and die of SIGABRT.
    Functions registered with `atexit` are called as usual.
    """
    code: int | None = 1  # unless main returns

    def leave() -> None:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # the reader has gone
                stream.flush()
        os._exit(code or 0)

    atexit.register(leave)  # registered first, so called last, after Python's threads have ended
    try:
        code = main()
    except SystemExit as ended:  # argparse's
        code = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
        raise
    sys.exit(code)


def keep_freed_memory() -> None:
    """Have glibc reuse freed memory instead of returning it to the kernel; does nothing with another C library.

    Each training step frees and allocates the same large tensors. By default each comes fresh from the kernel, at a
    page fault every 4 KiB: a quarter of a step on two cores.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def program_path() -> str:
    """PATH with this environment's programs first, although it may not be activated.

    DeepSpeed uses the ninja that it finds there. Alternating between two versions would recompile everything each time.
    """
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def remove_left_over_locks(folder: Path) -> list[Path]:
    """Remove stale `lock` files of torch's JIT builds from `folder`; returns them.

    A process that compiles an extension holds such a file open and removes it at the end. If it is killed, all others
    wait forever. On a shared file system holders on other machines are not visible: a lock there has to be ten minutes
    old.
    """
    locks = [*folder.glob("*/lock"), *folder.glob("*/*/lock")]
    open_files = set(_open_files()) if locks else set()
    removed = []
    for lock in locks:
        with contextlib.suppress(OSError):  # released just now
            shared = _file_system(lock).startswith(SHARED_FILE_SYSTEMS)
            if str(lock.resolve()) not in open_files and (
                not shared or time.time() - lock.stat().st_mtime > STALE_SECONDS
            ):
                lock.unlink()
                removed.append(lock)
    return removed


def _open_files() -> Iterator[str]:
    """Paths that visible processes have open."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            yield os.readlink(descriptor)


def _file_system(path: Path) -> str:
    """The type of a path's file system."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    resolved = path.resolve()
    return max((len(point), kind) for point, kind in mounts if resolved.is_relative_to(point))[1]
