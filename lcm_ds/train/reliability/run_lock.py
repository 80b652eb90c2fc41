"""RUN/LOCK: rank 0 of a training locks its run directory from before it changes anything until it ends.

The kernel's file lock ends with its process. As it may not work across hosts (that depends on the file system), the
owner also writes a new number into the file every few seconds: a process that finds a file of another machine checks
whether it still changes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any

from lcm_ds.errors import InputError
from lcm_ds.files import lock, read_object

logger = logging.getLogger("lcm_ds.train")

BEAT_SECONDS = 5.0
# An owner on another machine is considered dead if the file has not changed for this long.
WATCH_SECONDS = 45.0


class RunLock:
    """Locks a run directory within a `with` block. Raises InputError if another training has locked it."""

    def __init__(self, run_dir: Path, beat: float = BEAT_SECONDS, watch: float = WATCH_SECONDS) -> None:
        self.path = run_dir / "LOCK"
        self._beat, self._watch = beat, watch
        self._own_entry = {"host": socket.gethostname(), "pid": os.getpid(), "machine": machine()}
        self._released = Event()

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            locked = lock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, self.path)
        except BlockingIOError:
            owner = read_object(self.path, default={})
            if owner.get("machine", self._own_entry["machine"]) == self._own_entry["machine"]:
                self._refuse(owner)
            locked = False  # a file server may keep the lock of a dead machine, even permanently
        except OSError:  # an unreachable file server
            locked = False
        self._wait_for_former_owner(locked)
        self._write(0)
        self._thread = Thread(target=self._beat_until_released, name="lcm-ds-run-lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._released.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)  # not deleted: another process may be about to lock it
        os.close(self._file)

    def _wait_for_former_owner(self, locked: bool) -> None:
        """Return once the owner named in the file is dead; raise InputError if it still writes."""
        former = read_object(self.path, default={})
        if not former:
            return
        if former.get("machine") == self._own_entry["machine"]:
            if not locked and Path(f"/proc/{former.get('pid')}").exists():
                self._refuse(former)
            return  # its lock has ended with it
        logger.warning("%s: was left by %s: checking whether it is still updated", self.path, _describe(former))
        until = time.monotonic() + self._watch
        while time.monotonic() < until:
            time.sleep(min(1.0, self._beat))
            now = read_object(self.path, default={})
            if now != former:
                self._refuse(now or former)
        logger.warning("%s: is no longer updated, taking over", self.path)

    def _refuse(self, owner: dict[str, Any]) -> None:
        os.close(self._file)
        raise InputError(
            f"{self.path.parent}: run directory is locked by {_describe(owner)}; wait until it ends, stop it with "
            f"touch {self.path.parent / 'STOP'}, or use another run_dir"
        )

    def _write(self, beat: int) -> None:
        text = json.dumps({**self._own_entry, "beat": beat}).encode()
        os.pwrite(self._file, text, 0)
        os.ftruncate(self._file, len(text))

    def _beat_until_released(self) -> None:
        beat = 0
        while not self._released.wait(self._beat):
            beat += 1
            with contextlib.suppress(OSError):  # e.g. a full disk or an unreachable file server
                now = read_object(self.path, default={})
                if now and {**now, "beat": 0} != {**self._own_entry, "beat": 0}:
                    logger.error("%s: %s has taken over this run; this process exits", self.path, _describe(now))
                    os._exit(1)
                self._write(beat)


def machine() -> str:
    """An id shared by processes that see each other's PIDs: the kernel's boot id and PID namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def _describe(owner: dict[str, Any]) -> str:
    return f"PID {owner.get('pid', 'unknown')} on {owner.get('host', 'unknown')}"
