"""The processes of a run on this host: started together, ended together.

Promises: the death of one worker ends the others; a signal to the launcher reaches every worker; no worker outlives the
launcher, however the launcher ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

from lcm_ds.processes import die_with_parent
from lcm_ds.train.place import Place, free_port

STOPPED = 75
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE_SECONDS = 30.0  # between SIGTERM and SIGKILL; DeepSpeed's launcher gives as much
POLL_SECONDS = 0.05
# Before the others of a stopped or a refused run are told to end: they are on their way out, and have things to write.
PATIENCE_SECONDS = {STOPPED: GRACE_SECONDS, 2: 5.0}

Worker = subprocess.Popen[bytes]


def run_local(
    command: Sequence[str],
    processes: int,
    environ: Mapping[str, str] | None = None,
    master_port: int | None = None,
    grace: float = GRACE_SECONDS,
) -> int:
    """Run `command` in that many processes, each told its place, and wait for all of them.

    Returns 0 where all ended well, else the exit code of the worker that failed first: 2 and 75 as they are, anything
    else, death by a signal included, as 1. `grace` is in seconds. Call it from the main thread: it handles signals.
    """
    environ = dict(os.environ if environ is None else environ)
    port = master_port or free_port()
    environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    workers: list[Worker] = []
    with _forwarding(workers) as received:
        try:
            for rank in range(processes):
                place = Place(rank, processes, rank, processes, "127.0.0.1", port)
                workers.append(_start(command, {**environ, **place.environment()}))
            for number, told in received:  # while some were not there yet
                for worker in workers[told:]:
                    worker.send_signal(number)
            return _wait(workers, grace)
        finally:
            for worker in workers:
                if worker.returncode is None:
                    _kill(worker)


def exit_code(returncode: int) -> int:
    """A worker's exit code as the launcher passes it on (DESIGN: Contract 4)."""
    return returncode if returncode in (0, 2, STOPPED) else 1


def _start(command: Sequence[str], environ: Mapping[str, str]) -> Worker:
    # A session of its own: a Ctrl-C on the terminal reaches the launcher alone, which passes it on once.
    return subprocess.Popen(command, env=environ, start_new_session=True, preexec_fn=die_with_parent())


@contextlib.contextmanager
def _forwarding(workers: list[Worker]) -> Iterator[list[tuple[int, int]]]:
    """While inside, signals to this process go on to the workers, which save and end with 75.

    Yields the signals received, each with how many workers were there to be told.
    """
    received: list[tuple[int, int]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append((number, len(workers)))
        for worker in workers:
            worker.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(workers: list[Worker], grace: float) -> int:
    """Wait for all workers; end the others where one fails."""
    alive = set(range(len(workers)))
    first = 0  # exit code of the first that did not end with 0
    ends_at = kills_at = float("inf")
    while alive:
        ended = {rank for rank in alive if _has_ended(workers[rank])}
        alive -= ended
        failed = {rank: workers[rank].returncode for rank in ended if workers[rank].returncode != 0}
        if failed and not first:
            # Of several found at one look: bad input explains what the others died of, a stop explains nothing.
            rank = min(failed, key=lambda rank: (failed[rank] != 2, failed[rank] == STOPPED, rank))
            first = failed[rank]
            ends_at = time.monotonic() + min(grace, PATIENCE_SECONDS.get(first, 0.0))
            if first not in PATIENCE_SECONDS:
                how = f"was killed by {signal.Signals(-first).name}" if first < 0 else f"ended with exit code {first}"
                print(f"lcm-ds launch: rank {rank} (process {workers[rank].pid}) {how}", file=sys.stderr, flush=True)
        now = time.monotonic()
        if now >= ends_at:
            for rank in alive:
                workers[rank].terminate()
            ends_at, kills_at = float("inf"), now + grace
        if now >= kills_at:
            for rank in alive:
                _kill(workers[rank])
            alive.clear()
        if alive:
            time.sleep(POLL_SECONDS)
    return exit_code(first)


def _has_ended(worker: Worker) -> bool:
    """Whether a worker is gone; what it started and left behind goes with it."""
    if os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return False
    _kill(worker)
    return True


def _kill(worker: Worker) -> None:
    """Kill a worker that has not been waited for, so that its number is still its own, and its process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
