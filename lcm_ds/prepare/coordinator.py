"""What the ranks of a preparation exchange: which unit each one makes, what is written, and their progress.

All of it goes through a store that rank 0 holds, a few hundred bytes per unit. No process group is needed: ranks work
at their own speed, and only rank 0 has to last to the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import DistNetworkError, DistStoreError, HashStore, Store

from lcm_ds.distributed.environment import DistEnv
from lcm_ds.distributed.rendezvous import Rendezvous
from lcm_ds.errors import InputError, PeerFailed
from lcm_ds.signals import FAILED, STOPPED

START_TIMEOUT = timedelta(hours=2)  # rank 0 may first have to read thousands of files, or fetch a model
SHUTDOWN_SECONDS = 5.0  # for the other ranks to see that rank 0 is about to exit
# Keys of the store.
_START, _NEXT, _REPORTS, _FAILURE, _DEREGISTERED = "start", "next", "reports", "failure", "deregistered"
_FINISHED, _ACKNOWLEDGED = "finished", "acknowledged"


class Coordinator:
    """One rank's connection to the others. Safe to use from several threads."""

    def __init__(self, env: DistEnv) -> None:
        self.env = env
        self._rendezvous = None if env.world_size == 1 else Rendezvous(env, "prepare", START_TIMEOUT)
        self._store: Store = HashStore() if self._rendezvous is None else self._rendezvous.store
        self._reports_read = 0

    @property
    def is_coordinator(self) -> bool:
        """Whether this is rank 0."""
        return self.env.rank == 0

    def start(self, message: dict[str, Any]) -> None:
        """Rank 0: let the others start, with what they have to know."""
        self._store.set(_START, json.dumps(message))

    def wait_for_start(self) -> dict[str, Any]:
        """Other ranks: wait for rank 0's message. Raises PeerFailed."""
        self._store.wait([_START], START_TIMEOUT)
        self.raise_if_failed()
        message: dict[str, Any] = json.loads(self._store.get(_START))
        return message

    def claim(self) -> int:
        """The next number from 0 that no rank has claimed. Raises PeerFailed."""
        self.raise_if_failed()
        return self._store.add(_NEXT, 1) - 1

    def report(self, message: dict[str, Any]) -> None:
        """Send rank 0 a message."""
        number = self._store.add(_REPORTS, 1)
        self._store.set(f"{_REPORTS}/{number}", json.dumps(message))

    def new_reports(self) -> list[dict[str, Any]]:
        """Rank 0: the messages that have come since the last call."""
        messages = []
        # No `get` of a key that may not exist yet: it would wait, and block this process's other threads.
        while self._store.check([key := f"{_REPORTS}/{self._reports_read + 1}"]):
            self._reports_read += 1
            messages.append(json.loads(self._store.get(key)))
            self._store.delete_key(key)
        return messages

    def report_progress(self, figures: dict[str, float]) -> None:
        """Publish this rank's progress."""
        self._store.set(f"figures/{self.env.rank}", json.dumps(figures))

    def progress_of_ranks(self) -> list[dict[str, float]]:
        """The progress of each rank that has published it."""
        keys = [f"figures/{rank}" for rank in range(self.env.world_size)]
        return [json.loads(self._store.get(key)) for key in keys if self._store.check([key])]

    def deregister(self) -> None:
        """This rank has nothing left to report."""
        self._store.add(_DEREGISTERED, 1)

    def deregistered(self) -> int:
        """The number of ranks that have nothing left to report."""
        return self._store.add(_DEREGISTERED, 0)

    def finish(self) -> None:
        """Rank 0: the dataset is finished, and the others may exit; they get time to see it."""
        self._store.set(_FINISHED, "")
        self._wait_for_others(_ACKNOWLEDGED)

    def wait_for_finish(self) -> None:
        """Other ranks: wait until the dataset is finished. Raises PeerFailed."""
        try:
            while not self._store.check([_FINISHED]):
                self.raise_if_failed()
                time.sleep(0.1)
            self._store.add(_ACKNOWLEDGED, 1)
        except (DistStoreError, DistNetworkError):
            raise PeerFailed(FAILED, "") from None  # rank 0 has exited because of its own error

    def check_arrivals(self, remind: Callable[[str], None]) -> None:
        """Rank 0: remind the user now and then of ranks that are missing.

        Raises TransientError if they are late and all ranks that came have deregistered.
        """
        rendezvous = self._rendezvous
        if rendezvous and not rendezvous.complete(remind) and self.deregistered() >= rendezvous.arrived():
            rendezvous.check_patience()

    def fail(self, error: BaseException) -> BaseException:
        """Let the others exit, too, with the reason; returns what this rank raises, so that only rank 0 prints it."""
        try:
            if not self._store.check([_FAILURE]):
                self._store.set(_FAILURE, json.dumps(_exit_code_and_message(self.env.rank, error)))
            if self.is_coordinator:
                self._store.set(_START, "{}")
                self._wait_for_others(_DEREGISTERED)
            else:
                self.deregister()
        except (DistStoreError, DistNetworkError):
            return PeerFailed(FAILED, "")  # rank 0 has exited because of its own error
        return error if self.is_coordinator else PeerFailed(_exit_code_and_message(0, error)[0], "")

    def _wait_for_others(self, key: str) -> None:
        """Wait a few seconds for the others, each of which adds 1 to `key`, before this rank exits with the store."""
        until = time.monotonic() + SHUTDOWN_SECONDS
        while self._store.add(key, 0) < self.env.world_size - 1 and time.monotonic() < until:
            time.sleep(0.05)

    def raise_if_failed(self) -> None:
        """Raise PeerFailed if another rank has failed."""
        if self._store.check([_FAILURE]):
            code, message = json.loads(self._store.get(_FAILURE))
            raise PeerFailed(code, message)


def _exit_code_and_message(rank: int, error: BaseException) -> tuple[int, str]:
    """The exit code for an error, and the message for the user."""
    match error:
        case PeerFailed():
            return error.code, error.message
        case InputError():
            return error.exit_code, str(error)
        case KeyboardInterrupt():
            return STOPPED, ""
    return FAILED, f"rank {rank}: {type(error).__name__}: {error}"
