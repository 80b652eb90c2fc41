"""Where the processes of a job find one another: a store that rank 0 holds, and who has not come yet.

Without it, a rank that nobody starts keeps the others waiting for as long as a collective may take. RANK and WORLD_SIZE
left behind in a shell or a notebook are the usual reason.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, Store, TCPStore

from lcm_ds.distributed.environment import DistEnv
from lcm_ds.errors import TransientError, first_line

logger = logging.getLogger("lcm_ds.train")

# Hosts of a cluster load their libraries from one file server, some much later than others.
SECONDS_A_REMINDER, PATIENCE_SECONDS = 60.0, 600.0
_LOOK_SECONDS = 0.05
_REMEDY = "see what became of it, or unset RANK and WORLD_SIZE if no launcher started this"
_ARRIVED, _MET = "arrived", "met"
_LOOK_SECONDS_AT_MOST = 1.0  # at a port that nobody listens on: thousands of ranks may do so

# Of rank 0; kept to the end of the process, for the others may come to its next meeting before it does.
_servers: list[Store] = []
_meetings: Counter[tuple[str, DistEnv]] = Counter()  # of this process so far


class Meeting:
    """One process of several that look for one another. Raises TransientError if rank 0 does not come, or ends.

    Args:
        place: This process among them.
        purpose: What they meet for. torchrun's store is there for all that its processes do, one thing after the other:
            each meeting has keys of its own, by purpose and how often this process met for it at this place before.
            (At this place: processes that it has started itself, at a port of theirs, meet it for the first time.)
        timeout: How long a value is waited for in `store`.
    """

    def __init__(self, place: DistEnv, purpose: str, timeout: timedelta = timedelta(seconds=PATIENCE_SECONDS)) -> None:
        self.place = place
        self._since = self._reminded = time.monotonic()
        prefix = f"lcm-ds/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{purpose}/{_meetings[purpose, place]}"
        _meetings[purpose, place] += 1
        try:
            self.store: Store = PrefixStore(prefix, self._open(timeout))
            # A process that was started again in its rank's place comes once.
            if not self.store.check([f"{_ARRIVED}/{place.rank}"]):
                self.store.set(f"{_ARRIVED}/{place.rank}", "")
                self.store.add(_ARRIVED, 1)
        except (DistStoreError, DistNetworkError):
            raise _no_answer(place) from None

    def arrived(self) -> int:
        """How many processes have come."""
        return self.store.add(_ARRIVED, 0)

    def complete(self, say: Callable[[str], None]) -> bool:
        """Whether all have come; once a minute `say` is told who has not."""
        if self.arrived() >= self.place.world_size:
            return True
        if time.monotonic() - self._reminded >= SECONDS_A_REMINDER:
            self._reminded = time.monotonic()
            say(f"waiting for {self._absent()}, {self._reminded - self._since:.0f} s so far; {_REMEDY}")
        return False

    def check_patience(self) -> None:
        """Raise TransientError once somebody has been waited for too long."""
        if time.monotonic() - self._since >= PATIENCE_SECONDS and self.arrived() < self.place.world_size:
            raise self._too_late(self._absent())

    def _absent(self) -> str:
        ranks = [rank for rank in range(self.place.world_size) if not self.store.check([f"{_ARRIVED}/{rank}"])]
        return self._named(ranks)

    def _named(self, ranks: list[int]) -> str:
        some = ", ".join(map(str, ranks[:8])) + (" …" if len(ranks) > 8 else "")
        size = self.place.world_size
        told = f" (WORLD_SIZE={size} in the environment)" if "WORLD_SIZE" in os.environ else ""
        return f"rank{'s' * (len(ranks) > 1)} {some} of {size}{told}"

    def _too_late(self, absent: str) -> TransientError:
        return TransientError(f"{absent} did not come in {PATIENCE_SECONDS / 60:g} minutes; {_REMEDY}")

    def _open(self, timeout: timedelta) -> Store:
        place = self.place
        # Under torchrun the store is its agent's, and outlives a restart of the workers; not for processes that one of
        # its workers has started itself.
        agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        agents &= os.environ.get("MASTER_PORT") == str(place.master_port)
        holds = place.rank == 0 and not agents
        if not holds:
            self._await_listener()
        try:
            store = TCPStore(
                place.master_addr,
                place.master_port,
                None,
                is_master=holds,
                wait_for_workers=False,
                multi_tenant=True,  # this process may have, or will have, torch.distributed's own there
            )
        except DistNetworkError as error:
            where = f"{place.master_addr}:{place.master_port}"
            raise TransientError(f"MASTER_PORT: no store at {where}: {first_line(error)}") from None
        store.set_timeout(timeout)
        if holds:
            _servers.append(store)
        return store

    def _await_listener(self) -> None:
        """Wait until rank 0 listens. TCPStore would wait, too, with a stack of C++ for each time it has waited."""
        address = (self.place.master_addr, self.place.master_port)
        absent = f"{self._named([0])} at {address[0]}:{address[1]}"
        pause = _LOOK_SECONDS
        while True:
            try:
                socket.create_connection(address, timeout=SECONDS_A_REMINDER).close()
                return
            except OSError:
                now = time.monotonic()
            if now - self._since >= PATIENCE_SECONDS:
                raise self._too_late(absent)
            if now - self._reminded >= SECONDS_A_REMINDER:
                self._reminded = now
                logger.error("waiting for %s, %.0f s so far; %s", absent, now - self._since, _REMEDY)
            time.sleep(pause)
            pause = min(2 * pause, _LOOK_SECONDS_AT_MOST)


def meet(place: DistEnv, purpose: str) -> Meeting | None:
    """Wait until all processes of a job are there, before they join a process group: that would not say who is missing.

    Returns None if there are no others. Raises TransientError, in rank 0 with the ranks that did not come.
    """
    if place.world_size == 1:
        return None
    meeting = Meeting(place, purpose)
    try:
        if place.rank > 0:
            meeting.store.wait([_MET], timedelta(seconds=PATIENCE_SECONDS + SECONDS_A_REMINDER))
            if meeting.store.get(_MET) != b"all":
                raise TransientError([])  # rank 0 says it
            return meeting
    except (DistStoreError, DistNetworkError):
        raise _no_answer(place) from None
    while not meeting.complete(logger.error):
        try:
            meeting.check_patience()
        except TransientError:
            meeting.store.set(_MET, "not all")
            time.sleep(1.0)  # for the others to read it
            raise
        time.sleep(_LOOK_SECONDS)
    meeting.store.set(_MET, "all")
    return meeting


def _no_answer(place: DistEnv) -> TransientError:
    return TransientError(f"rank {place.rank}: rank 0 has ended, or does not answer")
