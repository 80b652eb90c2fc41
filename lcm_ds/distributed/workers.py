"""The processes of a job on this host: started together, ended together.

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
from collections.abc import Callable, Mapping, Sequence

from lcm_ds.distributed.environment import DistEnv, free_port
from lcm_ds.distributed.events import events
from lcm_ds.processes import set_parent_death_signal
from lcm_ds.signals import (
    DONE,
    STOP_SIGNALS,
    STOPPED,
    USER_ERROR,
    describe_exit,
    exit_code,
    failure_priority,
    on_stop_signal,
)

GRACE_SECONDS = 30.0  # between SIGTERM and SIGKILL, as DeepSpeed's launcher has it
POLL_SECONDS = 0.05
KILLED_SECONDS = 5.0  # until a killed process has to be gone
# Before SIGTERM goes to the other workers of a stopped or refused run, which are about to exit and may be saving.
PATIENCE_SECONDS = {STOPPED: GRACE_SECONDS, USER_ERROR: 5.0}

Worker = subprocess.Popen[bytes]


def run_local(
    command: Sequence[str],
    processes: int,
    environ: Mapping[str, str] | None = None,
    master_port: int | None = None,
    grace: float = GRACE_SECONDS,
    signals: list[int] | None = None,
    output: int | None = None,
) -> int:
    """Run a command in several processes, each with its rank in the environment, and wait for all of them.

    Call it from the main thread: it handles signals, which go on to the workers.

    Args:
        command: A worker's command line.
        processes: The number of workers.
        environ: Their environment variables; default: this process's.
        master_port: The port of rank 0; default: a free one.
        grace: Seconds between SIGTERM and SIGKILL.
        signals: Receives the stop signals that came.
        output: A file descriptor for the workers' stdout and stderr, instead of this process's.

    Returns:
        0 if all ended well, else the exit code of the worker that failed first: 2 and 75 unchanged, anything else,
        death by a signal included, as 1.
    """
    environ = dict(os.environ if environ is None else environ)
    environ.setdefault("OMP_NUM_THREADS", threads_per_worker(processes))
    port = master_port or free_port()
    received = [] if signals is None else signals
    forwarded = 0
    workers = Workers(grace)
    restore_handlers = on_stop_signal(received.append)
    try:
        for rank in range(processes):
            workers.start(command, environ, DistEnv.local(rank, processes, port), output)
        while not workers.all_exited:
            for number in received[forwarded:]:
                workers.send_signal(number)
                forwarded += 1
            for rank, code in workers.poll().items():
                if workers.first_failed == rank:
                    what = describe_exit(code)
                    events.emit("failure", origin=f"rank {rank}", message=what, code=exit_code(code))
                    if code not in PATIENCE_SECONDS:
                        message = f"lcm-ds launch: rank {rank} (process {workers.processes[rank].pid}) {what}"
                        print(message, file=sys.stderr, flush=True)
            time.sleep(POLL_SECONDS)
        return workers.exit_code
    finally:
        workers.kill()
        restore_handlers()


def run_with_restarts(
    run: Callable[[list[int]], int], progress: Callable[[], int], max_restarts: int = 0, backoff: float = 10.0
) -> int:
    """Call `run` until it ends well, up to `max_restarts` more times after failures.

    It is not called again after a stop signal, invalid input (2), a stop on request (75), or a second failure without
    progress.

    Args:
        run: Returns an exit code, and appends the stop signals that it got to its list.
        progress: A number that grows as the work advances.
        max_restarts: 0: call it once.
        backoff: Seconds before a restart.

    Returns:
        The last exit code.
    """
    signals: list[int] = []
    previous: int | None = None
    for restart in range(max_restarts + 1):
        code = run(signals)
        if code in (DONE, USER_ERROR, STOPPED) or signals or restart == max_restarts:
            return code
        current = progress()
        if previous is not None and current <= previous:
            print(f"lcm-ds launch: no progress since the last restart (at {current}): giving up", file=sys.stderr)
            return code
        previous = current
        events.emit("restart", number=restart + 1, of=max_restarts, seconds=backoff, progress=current)
        if _stop_signal_within(backoff, f"lcm-ds launch: restart {restart + 1} of {max_restarts} in {backoff:g} s"):
            return STOPPED
    raise AssertionError("the last run returns")


def _stop_signal_within(seconds: float, message: str) -> bool:
    """Print a message and wait for a stop signal; returns whether one came, from the message on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        print(message, file=sys.stderr, flush=True)
        return signal.sigtimedwait(STOP_SIGNALS, seconds) is not None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def threads_per_worker(processes: int) -> str:
    """OMP_NUM_THREADS unless the user has set it: the cores that the launcher may use, divided among the workers."""
    return str(max(1, len(os.sched_getaffinity(0)) // processes))


class Workers:
    """The workers of one host, in the order in which they were started: one that fails ends the others.

    Args:
        grace: Seconds between SIGTERM and SIGKILL.
        patience: Seconds before SIGTERM goes to the others of a failed worker; default: by its exit code.
    """

    def __init__(self, grace: float, patience: float | None = None) -> None:
        self.processes: list[Worker] = []
        self.first_failed: int | None = None  # the worker that failed first
        self._grace, self._patience = grace, patience
        self._alive: set[int] = set()
        self._terminate_at = self._kill_at = float("inf")

    def start(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        env: DistEnv,
        output: int | None = None,
        stdin: bytes | None = None,
    ) -> Worker:
        """Start one more worker. Call it from a thread that lasts: when the thread ends, the kernel kills the worker.

        Args:
            command: Its command line.
            environ: Its environment variables, without those of `env`.
            env: Its rank.
            output: What subprocess takes as stdout and stderr.
            stdin: What it reads; default: this process's stdin.
        """
        # In its own session: Ctrl-C on the terminal reaches only the launcher, which forwards it once.
        worker = subprocess.Popen(
            command,
            env=env.apply_to(environ),
            stdin=None if stdin is None else subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=set_parent_death_signal(),
        )
        if worker.stdin is not None:
            with contextlib.suppress(BrokenPipeError), worker.stdin as pipe:
                pipe.write(stdin or b"")
        self._alive.add(len(self.processes))
        self.processes.append(worker)
        return worker

    @property
    def all_exited(self) -> bool:
        """Whether `poll` has seen all of them end."""
        return not self._alive

    @property
    def exit_code(self) -> int:
        """0 if all ended well, else the code of the worker that failed first, as a launcher passes it on."""
        return DONE if self.first_failed is None else exit_code(self.processes[self.first_failed].returncode)

    def poll(self) -> dict[int, int]:
        """Return the exit codes of those that have ended since the last call; end the others if one has failed."""
        ended = {index for index in self._alive if _has_ended(self.processes[index])}
        self._alive -= ended
        codes = {index: self.processes[index].returncode for index in sorted(ended)}
        failed = [index for index, code in codes.items() if code != DONE]
        if failed and self.first_failed is None:
            self.first_failed = min(failed, key=lambda index: (failure_priority(codes[index]), index))
            by_code = min(self._grace, PATIENCE_SECONDS.get(codes[self.first_failed], 0.0))
            self.terminate(by_code if self._patience is None else self._patience)
        now = time.monotonic()
        if now >= self._terminate_at:
            self.send_signal(signal.SIGTERM)
            self._terminate_at = float("inf")
        if now >= self._kill_at:
            self.kill()
        return codes

    def wait(self, timeout: float) -> None:
        """Wait until all have ended; kill those that have not after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not self.all_exited and time.monotonic() < deadline:
            self.poll()
            time.sleep(POLL_SECONDS)
        self.kill()

    def terminate(self, delay: float = 0.0) -> None:
        """Have `poll` send SIGTERM in `delay` seconds, and SIGKILL a grace later; only the first call counts."""
        if self._kill_at == float("inf"):
            self._terminate_at = time.monotonic() + delay
            self._kill_at = self._terminate_at + self._grace

    def send_signal(self, number: int) -> None:
        """Send a signal to those that run."""
        for worker in self.processes:
            if _is_running(worker):
                os.kill(worker.pid, number)

    def kill(self) -> None:
        """Kill those that run, and what they started."""
        for index in self._alive:
            _kill_group(self.processes[index])
        for index in self._alive:
            with contextlib.suppress(subprocess.TimeoutExpired):  # not even SIGKILL ends one that hangs in a driver
                self.processes[index].wait(KILLED_SECONDS)


def _is_running(worker: Worker) -> bool:
    """Whether a worker runs. One that has ended is not reaped here: until it is, no other process gets its PID."""
    if worker.returncode is not None:
        return False
    try:
        return os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:  # the calling program ignores SIGCHLD, or has reaped it
        return worker.poll() is None


def _has_ended(worker: Worker) -> bool:
    """Whether a worker has ended; processes that it has left behind are killed."""
    if _is_running(worker):
        return False
    if worker.returncode is None:
        _kill_group(worker)
        worker.wait()
    return True


def _kill_group(worker: Worker) -> None:
    """Kill a worker and its process group, unless it was reaped: another process may have its PID then."""
    if worker.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)
