"""A slow rank is named, with its host, and its share of the step is logged."""

import json
import socket
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lcm_ds.config import GuardConfig
from lcm_ds.distributed.environment import DistEnv
from lcm_ds.train.monitoring.stragglers import WARM_UP, ForwardTimer, StragglerWatch, straggler_ranks


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Seconds that pass at each look at the clock."""
    pace, now = {"seconds": 0.0}, [0.0]

    def look():
        now[0] += pace["seconds"]
        return now[0]

    monkeypatch.setattr("lcm_ds.train.monitoring.stragglers.time", SimpleNamespace(perf_counter=look))
    return pace


def watch(tmp_path, rank=1, **guard):
    ranks = StragglerWatch(GuardConfig(**guard), DistEnv.local(rank, 3, 1), tmp_path)
    for step in range(WARM_UP):
        ranks.add(step, (100, 900, 90))
    ranks.reset()
    return ranks


def test_a_rank_that_is_slow_for_long_is_named_once_with_its_host(tmp_path, caplog):
    slow = watch(tmp_path, straggler=1.5, straggler_steps=3)
    usual, stopped, late = (100, 110, 90), (100, 500, 90), (100, 200, 90)
    times = [usual, late, usual, *[stopped, usual, usual] * 2, *[usual] * 3, *[late] * 3]
    said = {}
    for step, each in enumerate(times):
        slow.add(step, each)
        if caplog.messages:
            (said[step],) = caplog.messages
        caplog.clear()
    assert sorted(said) == [5, 14]
    host = socket.gethostname()
    assert said[5] == (
        f"rank 1 on {host} is a straggler: in 3 steps its forward passes took 2.40 × as long as the median rank's "
        "(guard.straggler: 1.5)"
    )
    lines = map(json.loads, (tmp_path / "stragglers.jsonl").read_text().splitlines())
    assert list(lines) == [
        {"step": step, "rank": 1, "host": host, "factor": factor} for step, factor in ((6, 2.4), (15, 2.0))
    ]
    assert straggler_ranks(tmp_path) == [1, 1]


def test_others_and_a_watch_that_is_off_say_nothing(tmp_path, caplog):
    for silent in (watch(tmp_path, rank=0, straggler_steps=1), watch(tmp_path, straggler=None, straggler_steps=1)):
        silent.add(0, (100, 900, 90))
        assert silent._window == []  # nothing piles up over a run
    assert caplog.messages == []
    assert straggler_ranks(tmp_path) == []


def test_a_slow_rank_that_costs_next_to_nothing_is_not_named(tmp_path, caplog, clock):
    clock["seconds"] = 1e-3
    slow = watch(tmp_path, straggler=1.5, straggler_steps=1)
    slow.add(0, (100, 205, 90))  # 105 microseconds of a millisecond
    assert len(caplog.messages) == 1
    clock["seconds"] = 1.0
    slow = watch(tmp_path, straggler=1.5, straggler_steps=1)
    slow.add(0, (100, 205, 90))  # of a second
    assert len(caplog.messages) == 1


def test_the_slowest_rank_and_what_it_costs_are_those_since_the_last_report(tmp_path):
    ranks = watch(tmp_path)
    nothing = {"slowest_rank": None, "slowest_rank_share": None}
    assert ranks.read(1.0) == nothing
    ranks.add(0, (0, 0, 0))  # no times yet
    assert ranks.read(1.0) == nothing
    ranks.add(1, (100_000, 100_000, 300_000))
    ranks.add(2, (120_000, 100_000, 200_000))
    assert ranks.read(step_time=1.0) == {"slowest_rank": 2, "slowest_rank_share": pytest.approx(0.14)}
    ranks.reset()
    assert ranks.read(1.0) == nothing


class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.ModuleDict({"down_proj": Sleep(0.02)})
        self.gather = Sleep(0.05)

    def forward(self, x):
        return self.mlp["down_proj"](self.gather(x))


class Sleep(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x


@pytest.mark.parametrize(("stage", "least"), [(2, 140_000), (3, 40_000)])
def test_the_clock_runs_in_the_forward_passes_of_training(stage, least, monkeypatch):
    monkeypatch.setattr("lcm_ds.train.monitoring.stragglers.time", time)
    model = Slow()
    timer = ForwardTimer(model, stage, torch.device("cpu"))
    assert timer.next_step() == 0
    for _ in range(2):
        model(torch.ones(1))
    with torch.no_grad():
        model(torch.ones(1))
    time.sleep(0.1)
    measured = timer.next_step()
    assert least <= measured
    assert measured < least * 2 or stage == 2  # without what gathers
    assert timer.next_step() == 0
