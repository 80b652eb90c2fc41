"""What the ranks of a preparation tell one another: which unit is whose, what is written, how far each is.

All of it goes through a store that rank 0 holds, a few hundred bytes a unit. No process group is needed: ranks work at
their own speed, and only rank 0 has to last to the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import DistNetworkError, DistStoreError, HashStore, Store

from lcm_ds.distributed.environment import DistEnv
from lcm_ds.distributed.rendezvous import Meeting
from lcm_ds.errors import InputError

# Until rank 0 begins: it may first have to look at thousands of files, or to fetch a model.
PATIENCE = timedelta(hours=2)
# For the others to see that rank 0 has failed.
SECONDS_TO_END = 5.0
_GO, _NEXT, _REPORTS, _FAILED, _LEFT = "go", "next", "reports", "failed", "left"
_FINISHED, _TOLD = "finished", "told"


class PeerFailed(Exception):
    """Another rank has failed with an exit code; `message` is empty where somebody else says why."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class Coordinator:
    """The other ranks, as one of them sees them. Safe to use from several threads."""

    def __init__(self, place: DistEnv) -> None:
        self.place = place
        self._meeting = None if place.world_size == 1 else Meeting(place, "prepare", PATIENCE)
        self._store: Store = HashStore() if self._meeting is None else self._meeting.store
        self._read = 0  # reports that `reports` has given

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.place.rank == 0

    def begin(self, said: dict[str, Any]) -> None:
        """Rank 0: let the others begin; `said` is what they have to know."""
        self._store.set(_GO, json.dumps(said))

    def wait(self) -> dict[str, Any]:
        """The others: what rank 0 says when they may begin. Raises PeerFailed."""
        self._store.wait([_GO], PATIENCE)
        self.check()
        said: dict[str, Any] = json.loads(self._store.get(_GO))
        return said

    def claim(self) -> int:
        """The next number from 0 that no rank has claimed. Raises PeerFailed."""
        self.check()
        return self._store.add(_NEXT, 1) - 1

    def report(self, message: dict[str, Any]) -> None:
        """Send rank 0 a message."""
        number = self._store.add(_REPORTS, 1)
        self._store.set(f"{_REPORTS}/{number}", json.dumps(message))

    def reports(self) -> list[dict[str, Any]]:
        """Rank 0: the messages that have come since it last asked."""
        found = []
        # Never `get` what may not be there yet: it would wait, and keep this process's other threads from the store.
        while self._store.check([key := f"{_REPORTS}/{self._read + 1}"]):
            self._read += 1
            found.append(json.loads(self._store.get(key)))
            self._store.delete_key(key)
        return found

    def tell(self, figures: dict[str, float]) -> None:
        """Say how far this rank is."""
        self._store.set(f"figures/{self.place.rank}", json.dumps(figures))

    def told(self) -> list[dict[str, float]]:
        """How far each rank is that has said it."""
        keys = [f"figures/{rank}" for rank in range(self.place.world_size)]
        return [json.loads(self._store.get(key)) for key in keys if self._store.check([key])]

    def leave(self) -> None:
        """This rank has nothing left to report."""
        self._store.add(_LEFT, 1)

    def left(self) -> int:
        """How many ranks have left."""
        return self._store.add(_LEFT, 0)

    def finish(self) -> None:
        """Rank 0: the dataset is finished, and the others may end; they are given time to see it."""
        self._store.set(_FINISHED, "")
        self._await_others(_TOLD)

    def await_finish(self) -> None:
        """The others: until the dataset is finished. Raises PeerFailed."""
        try:
            while not self._store.check([_FINISHED]):
                self.check()
                time.sleep(0.1)
            self._store.add(_TOLD, 1)
        except (DistStoreError, DistNetworkError):
            raise PeerFailed(1, "") from None  # rank 0 has ended, which is why

    def check_arrivals(self, left: int, say: Callable[[str], None]) -> None:
        """Rank 0: tell `say` now and then of ranks that have not come.

        left: how many ranks have left. Raises TransientError if they are all that have come, and the others are late.
        """
        if self._meeting is not None and not self._meeting.complete(say) and left >= self._meeting.arrived():
            self._meeting.check_patience()

    def fail(self, error: BaseException) -> BaseException:
        """Let the others end, too, and know why; returns what this rank is to end with: rank 0 says it."""
        try:
            if not self._store.check([_FAILED]):
                self._store.set(_FAILED, json.dumps(_told(self.place.rank, error)))
            if self.leads:
                self._store.set(_GO, "{}")
                self._await_others(_LEFT)
            else:
                self.leave()
        except (DistStoreError, DistNetworkError):
            return PeerFailed(1, "")  # rank 0 has ended, which is why
        if self.leads:
            return error
        return PeerFailed(error.code if isinstance(error, PeerFailed) else _told(0, error)[0], "")

    def _await_others(self, key: str) -> None:
        """Give the others time to see that this rank is about to end, and the store with it: each adds 1 to `key`."""
        until = time.monotonic() + SECONDS_TO_END
        while self._store.add(key, 0) < self.place.world_size - 1 and time.monotonic() < until:
            time.sleep(0.05)

    def check(self) -> None:
        """Raise PeerFailed where another rank has failed."""
        if self._store.check([_FAILED]):
            code, message = json.loads(self._store.get(_FAILED))
            raise PeerFailed(code, message)


def _told(rank: int, error: BaseException) -> tuple[int, str]:
    """The exit code that an error means, and what the user reads."""
    if isinstance(error, PeerFailed):
        return error.code, error.message
    if isinstance(error, InputError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 75, ""
    return 1, f"rank {rank}: {type(error).__name__}: {error}"
