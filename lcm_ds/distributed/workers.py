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
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType

from lcm_ds.distributed.environment import DistEnv, free_port
from lcm_ds.processes import set_parent_death_signal

STOPPED = 75
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE_SECONDS = 30.0  # between SIGTERM and SIGKILL; DeepSpeed's launcher gives as much
LONGEST_BACK_OFF_SECONDS = 300.0
POLL_SECONDS = 0.05
KILLED_SECONDS = 5.0  # for a process that was killed to be gone
# Before the others of a stopped or a refused run are told to end: they are on their way out, and have things to write.
PATIENCE_SECONDS = {STOPPED: GRACE_SECONDS, 2: 5.0}

Worker = subprocess.Popen[bytes]


def run_local(
    command: Sequence[str],
    processes: int,
    environ: Mapping[str, str] | None = None,
    master_port: int | None = None,
    grace: float = GRACE_SECONDS,
    asked: list[int] | None = None,
    output: int | None = None,
) -> int:
    """Run `command` in that many processes, each told its place, and wait for all of them.

    asked: takes in the signals that came. output: what the workers have for stdout and stderr, instead of this one's.

    Returns 0 where all ended well, else the exit code of the worker that failed first: 2 and 75 as they are, anything
    else, death by a signal included, as 1. `grace` is in seconds. Call it from the main thread: it handles signals.
    """
    environ = dict(os.environ if environ is None else environ)
    port = master_port or free_port()
    environ.setdefault("OMP_NUM_THREADS", threads_each(processes))
    workers = Workers(grace)
    with _forwarding(workers) as received:
        try:
            for rank in range(processes):
                workers.start(command, environ, DistEnv(rank, processes, rank, processes, "127.0.0.1", port), output)
            for number, told in received:  # while some were not there yet
                workers.send_signal(number, told)
            while not workers.gone():
                if asked is not None:
                    asked[:] = [number for number, _ in received]
                for rank, code in workers.look().items():
                    if workers.first == rank and code not in PATIENCE_SECONDS:
                        pid = workers.processes[rank].pid
                        said = f"lcm-ds launch: rank {rank} (process {pid}) {describe_exit(code)}"
                        print(said, file=sys.stderr, flush=True)
                time.sleep(POLL_SECONDS)
            return workers.code()
        finally:
            workers.kill()


def run_with_restarts(
    run: Callable[[list[int]], int], progress: Callable[[], int], restarts: int = 0, back_off: float = 10.0
) -> int:
    """Run something until it ends well, as often as `restarts` more times where it fails; returns the last exit code.

    run: puts into its list the signals that came. Not again after one of those, a mistake (2), a stop on request (75),
    or where `progress`, which grows, is what it was at the failure before. back_off: seconds before the first restart,
    twice as long before each further one.
    """
    asked: list[int] = []
    before: int | None = None
    for number in range(restarts + 1):
        code = run(asked)
        if code in (0, 2, STOPPED) or asked or number == restarts:
            return code
        now = progress()
        if before is not None and now <= before:
            print(f"lcm-ds launch: no progress since the last restart (at {now}): not started again", file=sys.stderr)
            return code
        before, seconds = now, min(back_off * 2**number, LONGEST_BACK_OFF_SECONDS)
        said = f"lcm-ds launch: restart {number + 1} of {restarts} in {seconds:g} s"
        if _signalled_within(seconds, said):
            return STOPPED
    raise AssertionError("the last run returns")


def _signalled_within(seconds: float, said: str) -> bool:
    """Say so and wait, and whether one of the signals that stop a run came in the meantime."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    try:
        print(said, file=sys.stderr, flush=True)
        return signal.sigtimedwait(FORWARDED, seconds) is not None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def exit_code(returncode: int) -> int:
    """A worker's exit code as the launcher passes it on (DESIGN: Contract 4)."""
    return returncode if returncode in (0, 2, STOPPED) else 1


def describe_exit(returncode: int) -> str:
    """What a process came to, in words."""
    if returncode < 0:
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"ended with exit code {returncode}"


def precedence(returncode: int) -> tuple[bool, bool]:
    """Of failures seen at the same time the lowest counts: bad input explains what others died of, a stop nothing."""
    return returncode != 2, returncode == STOPPED


def threads_each(processes: int) -> str:
    """OMP_NUM_THREADS where nobody said it: this host's cores, shared out among so many workers."""
    return str(max(1, len(os.sched_getaffinity(0)) // processes))


class Workers:
    """The workers of one host, by the order in which they were started: one that fails ends the others."""

    def __init__(self, grace: float) -> None:
        self.processes: list[Worker] = []
        self.first: int | None = None  # the worker that failed first
        self._grace = grace  # seconds between SIGTERM and SIGKILL
        self._alive: set[int] = set()
        self._ends_at = self._kills_at = float("inf")

    def start(
        self, command: Sequence[str], environ: Mapping[str, str], place: DistEnv, output: int | None = None
    ) -> Worker:
        """Start one more; `output` is what subprocess takes as stdout and stderr. Call it from a thread that lasts."""
        # A session of its own: a Ctrl-C on the terminal reaches the launcher alone, which passes it on once.
        worker = subprocess.Popen(
            command,
            env=place.within(environ),
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=set_parent_death_signal(),
        )
        self._alive.add(len(self.processes))
        self.processes.append(worker)
        return worker

    def gone(self) -> bool:
        """Whether all have ended."""
        return not self._alive

    def code(self) -> int:
        """0 where all ended well, else the exit code of the one that failed first, as a launcher passes it on."""
        return 0 if self.first is None else exit_code(self.processes[self.first].returncode)

    def look(self) -> dict[int, int]:
        """Those that have ended since the last look, with their exit codes. Ends the others where one failed."""
        ended = {number for number in self._alive if _has_ended(self.processes[number])}
        self._alive -= ended
        codes = {number: self.processes[number].returncode for number in sorted(ended)}
        failed = [number for number, code in codes.items() if code != 0]
        if failed and self.first is None:
            self.first = min(failed, key=lambda number: (precedence(codes[number]), number))
            self.end(min(self._grace, PATIENCE_SECONDS.get(codes[self.first], 0.0)))
        now = time.monotonic()
        if now >= self._ends_at:
            self.send_signal(signal.SIGTERM)
            self._ends_at = float("inf")
        if now >= self._kills_at:
            self.kill()
        return codes

    def end(self, after: float = 0.0) -> None:
        """Have `look` send SIGTERM in `after` seconds, and SIGKILL a grace later; the first call counts."""
        if self._kills_at == float("inf"):
            self._ends_at = time.monotonic() + after
            self._kills_at = self._ends_at + self._grace

    def send_signal(self, number: int, since: int = 0) -> None:
        """Send a signal to those that run, from the one of that number on."""
        for worker in self.processes[since:]:
            if _runs(worker):
                os.kill(worker.pid, number)

    def kill(self) -> None:
        """Kill those that run, and what they started."""
        for number in self._alive:
            _kill(self.processes[number])
        for number in self._alive:
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that not even SIGKILL ends, in a driver
                self.processes[number].wait(KILLED_SECONDS)


@contextlib.contextmanager
def _forwarding(workers: Workers) -> Iterator[list[tuple[int, int]]]:
    """While inside, signals to this process go on to the workers, which save and end with 75.

    Yields the signals received, each with how many workers were there to be told.
    """
    received: list[tuple[int, int]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append((number, len(workers.processes)))
        workers.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _runs(worker: Worker) -> bool:
    """Whether a worker runs. One that does not is not waited for here: until it is, its number is its own."""
    if worker.returncode is not None:
        return False
    return os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _has_ended(worker: Worker) -> bool:
    """Whether a worker is gone; what it started and left behind goes with it."""
    if _runs(worker):
        return False
    if worker.returncode is None:
        _kill(worker)
        worker.wait()
    return True


def _kill(worker: Worker) -> None:
    """Kill a worker and its process group, unless it has been waited for: then its number may be another's."""
    if worker.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)
