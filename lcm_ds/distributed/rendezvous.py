"""How the processes of a job find one another: a store that rank 0 holds, which shows the ranks that are missing.

Without it, a rank that was never started would keep the others waiting as long as a collective may take. The usual
cause is RANK and WORLD_SIZE left over in a shell or a notebook.
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
REMINDER_SECONDS, PATIENCE_SECONDS = 60.0, 600.0
POLL_SECONDS, MAX_CONNECT_SECONDS = 0.05, 1.0  # thousands of ranks may poll one port that nothing listens on yet
_REMEDY = "look at its log, or unset RANK and WORLD_SIZE if no launcher started this process"
_ARRIVED, _MET = "arrived", "met"

# Stores that this process holds as rank 0, until it exits: other ranks may be ahead of it in their next rendezvous.
_servers: list[Store] = []
_counts: Counter[tuple[str, DistEnv]] = Counter()  # rendezvous of this process so far


class Rendezvous:
    """This process's connection to the store of its job. Raises TransientError if rank 0 does not come, or has exited.

    Args:
        env: The rank of this process.
        purpose: What the ranks meet for. torchrun's store serves everything that its processes do, so each rendezvous
            has its own keys, by purpose and by how often this process met with this `env` before. (Child processes at
            their own port count from zero.)
        timeout: How long `store` waits for a value.
    """

    def __init__(self, env: DistEnv, purpose: str, timeout: timedelta = timedelta(seconds=PATIENCE_SECONDS)) -> None:
        self.env = env
        self._since = self._reminded = time.monotonic()
        prefix = f"lcm-ds/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{purpose}/{_counts[purpose, env]}"
        _counts[purpose, env] += 1
        try:
            self.store: Store = PrefixStore(prefix, self._open(timeout))
            # A process that was restarted under the same rank is counted once.
            if not self.store.check([f"{_ARRIVED}/{env.rank}"]):
                self.store.set(f"{_ARRIVED}/{env.rank}", "")
                self.store.add(_ARRIVED, 1)
        except (DistStoreError, DistNetworkError):
            raise _no_answer(env) from None

    def arrived(self) -> int:
        """The number of ranks that have come."""
        return self.store.add(_ARRIVED, 0)

    def complete(self, remind: Callable[[str], None]) -> bool:
        """Whether all ranks have come; once a minute `remind` gets a message that names the missing ones."""
        if self.arrived() >= self.env.world_size:
            return True
        if time.monotonic() - self._reminded >= REMINDER_SECONDS:
            self._reminded = time.monotonic()
            remind(f"waiting for {self._missing()}, {self._reminded - self._since:.0f} s so far; {_REMEDY}")
        return False

    def check_patience(self) -> None:
        """Raise TransientError if ranks are missing and the time to wait for them is over."""
        if time.monotonic() - self._since >= PATIENCE_SECONDS and self.arrived() < self.env.world_size:
            raise self._too_late(self._missing())

    def _missing(self) -> str:
        ranks = [rank for rank in range(self.env.world_size) if not self.store.check([f"{_ARRIVED}/{rank}"])]
        return self._describe(ranks)

    def _describe(self, ranks: list[int]) -> str:
        some = ", ".join(map(str, ranks[:8])) + (" …" if len(ranks) > 8 else "")
        size = self.env.world_size
        origin = f" (WORLD_SIZE={size} in the environment)" if "WORLD_SIZE" in os.environ else ""
        return f"rank{'s' * (len(ranks) > 1)} {some} of {size}{origin}"

    def _too_late(self, missing: str) -> TransientError:
        return TransientError(f"{missing} did not come in {PATIENCE_SECONDS / 60:g} minutes; {_REMEDY}")

    def _open(self, timeout: timedelta) -> Store:
        env = self.env
        # Under torchrun its agent holds the store, which outlives a restart of the workers. It is not the store of the
        # processes that one of its workers has started, which have another port.
        agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        agent_store &= os.environ.get("MASTER_PORT") == str(env.master_port)
        is_server = env.rank == 0 and not agent_store
        if not is_server:
            self._wait_for_rank_0()
        try:
            store = TCPStore(
                env.master_addr,
                env.master_port,
                None,
                is_master=is_server,
                wait_for_workers=False,
                multi_tenant=True,  # torch.distributed's own store may be in this process at the same port
            )
        except DistNetworkError as error:
            address = f"{env.master_addr}:{env.master_port}"
            raise TransientError(f"MASTER_PORT: no store at {address}: {first_line(error)}") from None
        store.set_timeout(timeout)
        if is_server:
            _servers.append(store)
        return store

    def _wait_for_rank_0(self) -> None:
        """Wait until rank 0 listens. TCPStore would wait, too, but print a C++ stack for each attempt."""
        address = (self.env.master_addr, self.env.master_port)
        missing = f"{self._describe([0])} at {address[0]}:{address[1]}"
        pause = POLL_SECONDS
        while True:
            try:
                socket.create_connection(address, timeout=REMINDER_SECONDS).close()
                return
            except OSError:
                now = time.monotonic()
            if now - self._since >= PATIENCE_SECONDS:
                raise self._too_late(missing)
            if now - self._reminded >= REMINDER_SECONDS:
                self._reminded = now
                logger.error("waiting for %s, %.0f s so far; %s", missing, now - self._since, _REMEDY)
            time.sleep(pause)
            pause = min(2 * pause, MAX_CONNECT_SECONDS)


def wait_for_all_ranks(env: DistEnv, purpose: str) -> Rendezvous | None:
    """Wait until all processes of a job have come, before they join a process group, which would not name the missing.

    Returns None if there are no others. Raises TransientError, which on rank 0 names the ranks that did not come.
    """
    if env.world_size == 1:
        return None
    rendezvous = Rendezvous(env, purpose)
    try:
        if env.rank > 0:
            rendezvous.store.wait([_MET], timedelta(seconds=PATIENCE_SECONDS + REMINDER_SECONDS))
            if rendezvous.store.get(_MET) != b"all":
                raise TransientError([])  # rank 0 prints the reason
            return rendezvous
    except (DistStoreError, DistNetworkError):
        raise _no_answer(env) from None
    while not rendezvous.complete(logger.error):
        try:
            rendezvous.check_patience()
        except TransientError:
            rendezvous.store.set(_MET, "not all")
            time.sleep(1.0)  # for the others to read it
            raise
        time.sleep(POLL_SECONDS)
    rendezvous.store.set(_MET, "all")
    return rendezvous


def _no_answer(env: DistEnv) -> TransientError:
    return TransientError(f"rank {env.rank}: rank 0 has exited, or does not answer")
