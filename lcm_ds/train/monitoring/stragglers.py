"""Ranks that are slower than the others: a sick device, a throttled one, a host with other work.

All ranks of a step end together, because each waits for the slowest in its collectives. What tells them apart is the
time of the forward pass, which has none; under ZeRO-3, whose forward pass gathers parameters, that of the layers' down
projections, whose parameters have been gathered before the clock starts.
"""

from __future__ import annotations

import json
import socket
import statistics
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_ds.config import GuardConfig
from lcm_ds.distributed.environment import DistEnv
from lcm_ds.train.monitoring.console import console

if TYPE_CHECKING:  # the launcher reads `straggler_ranks` before it imports torch
    import torch
    from torch import nn

STRAGGLERS = "stragglers.jsonl"  # in the run's folder
WARM_UP = 5  # steps after a start, in which operators are compiled and memory is found, that are not judged
LEAST_SHARE = 0.05  # of the time of the steps: a rank that costs less is not worth a warning, as with tiny models


class ForwardTimer:
    """Measures how long this rank computes in the forward passes of a step, without making it wait for its device."""

    def __init__(self, model: nn.Module, zero_stage: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0  # of the current step, on a CPU
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # of the current step, on a GPU
        self._earlier: deque[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = deque()  # steps that may not be done
        self._started: Any = None
        self._last = 0
        layers = [module for name, module in model.named_modules() if name.endswith("mlp.down_proj")]
        for module in layers if zero_stage == 3 else [model]:
            module.register_forward_pre_hook(self._start)
            module.register_forward_hook(self._stop)

    def _start(self, module: nn.Module, arguments: object) -> None:
        import torch

        if torch.is_grad_enabled():  # not in a validation
            self._started = self._now()

    def _stop(self, module: nn.Module, arguments: object, output: object) -> None:
        if self._started is None:
            return
        if self._on_gpu:
            self._events.append((self._started, self._now()))
        else:
            self._seconds += self._now() - self._started
        self._started = None

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def next_step(self) -> int:
        """Begin a step; returns the microseconds of the last one that the device has completed, 0 if there is none."""
        if not self._on_gpu:
            self._last, self._seconds = round(1e6 * self._seconds), 0.0
            return self._last
        if self._events:
            self._earlier.append(self._events)
            self._events = []
        while self._earlier and self._earlier[0][-1][1].query():
            self._last = round(1e3 * sum(start.elapsed_time(end) for start, end in self._earlier.popleft()))
        return self._last


class StragglerWatch:
    """Compares the ranks' times; a rank that is slow for long says so, with its host, also in RUN/stragglers.jsonl."""

    def __init__(self, config: GuardConfig, env: DistEnv, run_dir: Path) -> None:
        self._config, self._env, self._path = config, env, run_dir / STRAGGLERS
        self._warm_up = WARM_UP  # steps to come
        self._window: list[Sequence[int]] = []  # the steps that are judged next
        self._window_began = time.perf_counter()
        self._slow = False
        self.reset()

    def reset(self) -> None:
        """Forget the steps since the last report."""
        self._sums, self._steps = [0] * self._env.world_size, 0

    def add(self, step: int, times: Sequence[int]) -> None:
        """Count a step; warn on a rank that was slow in the last `guard.straggler_steps`, once until it is faster.

        Args:
            step: Its number, from 0.
            times: Microseconds of each rank's forward passes; all 0 if they are not known yet.
        """
        limit, steps = self._config.straggler, self._config.straggler_steps
        if len(times) < 2 or not all(times):
            return
        self._sums, self._steps = _sum([self._sums, times]), self._steps + 1
        if self._warm_up:
            self._warm_up, self._window_began = self._warm_up - 1, time.perf_counter()
            return
        if limit is None:
            return
        self._window.append(times)
        if len(self._window) < steps:
            return
        sums, self._window = _sum(self._window), []
        seconds, self._window_began = time.perf_counter() - self._window_began, time.perf_counter()
        own, median = sums[self._env.rank], statistics.median_low(sums)
        factor = own / median
        was_slow, self._slow = self._slow, factor > limit and (own - median) / 1e6 > LEAST_SHARE * seconds
        if was_slow or not self._slow:
            return
        host = socket.gethostname()
        entry = {"step": step + 1, "rank": self._env.rank, "host": host, "factor": round(factor, 3)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        console.warning(
            f"rank {self._env.rank} on {host} is a straggler: in {steps} steps its forward passes took {factor:.2f} × "
            f"as long as the median rank's (guard.straggler: {limit:g})"
        )

    def read(self, step_time: float) -> dict[str, Any]:
        """The slowest rank since the last `reset`, and how much longer than the median rank's its forward passes took.

        Args:
            step_time: Mean seconds of a step since then.

        Returns:
            slowest_rank; slowest_rank_share: that difference, as a share of the step. None with one rank.
        """
        if not self._steps:
            return {"slowest_rank": None, "slowest_rank_share": None}
        slowest = max(range(len(self._sums)), key=self._sums.__getitem__)
        difference = self._sums[slowest] - statistics.median_low(self._sums)
        return {"slowest_rank": slowest, "slowest_rank_share": difference / 1e6 / self._steps / step_time}


def _sum(rows: Sequence[Sequence[int]]) -> list[int]:
    """Of each column."""
    return [sum(column) for column in zip(*rows, strict=True)]


def straggler_ranks(run_dir: Path) -> list[int]:
    """The ranks in RUN/stragglers.jsonl, in the order in which they were slow."""
    path = run_dir / STRAGGLERS
    return [json.loads(line)["rank"] for line in path.read_bytes().splitlines()] if path.exists() else []
