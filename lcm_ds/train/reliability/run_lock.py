"""The one owner of a run's folder: RUN/LOCK, held by rank 0 from before it touches anything to its end.

The kernel's lock on the file ends with the process that holds it, however that ends. It may not reach from host to host
(it depends on the file system), so the owner also writes a new number into the file every few seconds: who finds the
lock free but the file written on another machine watches whether it goes on being written.
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
from lcm_ds.files import read_object

logger = logging.getLogger("lcm_ds.train")

BEAT_SECONDS = 5.0
# How long the file has to be as it was until its owner on another machine counts as dead.
WATCH_SECONDS = 45.0


class RunLock:
    """Owns a run's folder while inside `with`.

    Raises InputError, with host and process of the owner, where somebody else's training lives in it.
    """

    def __init__(self, run_dir: Path, beat: float = BEAT_SECONDS, watch: float = WATCH_SECONDS) -> None:
        self.path = run_dir / "LOCK"
        self._beat, self._watch = beat, watch
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "machine": machine()}
        self._ended = Event()

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            owner = read_object(self.path, default={})
            if owner.get("machine", self._me["machine"]) == self._me["machine"]:
                self._refuse(owner)
            locked = False  # a file server holds the lock of a machine that has died for a while, or for ever
        except OSError:
            locked = False  # a file system without locks
        self._wait_for_the_former_owner(locked)
        self._write(0)
        self._thread = Thread(target=self._go_on_beating, name="lcm-ds-owner", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)  # and not taken away: somebody may be about to lock it
        os.close(self._file)

    def _wait_for_the_former_owner(self, locked: bool) -> None:
        """Return once whoever the file names is gone; raise InputError where it writes on."""
        former = read_object(self.path, default={})
        if not former:
            return
        if former.get("machine") == self._me["machine"]:
            if not locked and Path(f"/proc/{former.get('pid')}").exists():
                self._refuse(former)
            return  # its lock has ended with it
        logger.warning("%s: was left by %s: is it still written?", self.path, _named(former))
        until = time.monotonic() + self._watch
        while time.monotonic() < until:
            time.sleep(min(1.0, self._beat))
            now = read_object(self.path, default={})
            if now != former:
                self._refuse(now or former)
        logger.warning("%s: is not written any more, this run goes on in its place", self.path)

    def _refuse(self, owner: dict[str, Any]) -> None:
        os.close(self._file)
        raise InputError(
            f"{self.path.parent}: {_named(owner)} trains here; wait for its end, stop it with "
            f"touch {self.path.parent / 'STOP'}, or take another run_dir"
        )

    def _write(self, beat: int) -> None:
        text = json.dumps({**self._me, "beat": beat}).encode()
        os.pwrite(self._file, text, 0)
        os.ftruncate(self._file, len(text))

    def _go_on_beating(self) -> None:
        beat = 0
        while not self._ended.wait(self._beat):
            beat += 1
            with contextlib.suppress(OSError):  # a full disk, a file server that is away for a while
                now = read_object(self.path, default={})
                if now and {**now, "beat": 0} != {**self._me, "beat": 0}:
                    logger.error("%s: %s has taken this run over: this process ends", self.path, _named(now))
                    os._exit(1)
                self._write(beat)


def machine() -> str:
    """What two processes have in common that can see one another's end: the kernel's boot and its set of processes."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def _named(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', 'unknown')} of host {owner.get('host', 'unknown')}"
