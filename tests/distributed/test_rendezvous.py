"""Who does not come to a run or an evaluation is named, and not waited for without end."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch.distributed as dist
from machine import patience

from lcm_ds.distributed import rendezvous
from lcm_ds.distributed.collectives import Ranks
from lcm_ds.distributed.environment import DistEnv, free_port
from lcm_ds.errors import TransientError
from lcm_ds.train.engine import init_distributed


def places(size: int) -> list[DistEnv]:
    port = free_port()
    return [DistEnv(rank, size, rank, size, "127.0.0.1", port) for rank in range(size)]


@pytest.fixture(autouse=True)
def first_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_counts", Counter())


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "REMINDER_SECONDS", 0.5)
    monkeypatch.setattr(rendezvous, "PATIENCE_SECONDS", 1.0)


def test_all_that_come_have_met() -> None:
    with ThreadPoolExecutor(3) as pool:
        met = list(pool.map(partial(rendezvous.wait_for_all_ranks, purpose="train"), places(3)))
    assert [each is not None and each.env.rank for each in met] == [0, 1, 2]
    assert rendezvous.wait_for_all_ranks(places(1)[0], "train") is None


def test_processes_meet_again_and_for_something_else_in_one_store() -> None:
    """As torchrun's workers do, whose store their agent holds."""
    code = "import os; from lcm_ds.distributed.environment import detect_environment\n"
    code += "from lcm_ds.distributed.rendezvous import wait_for_all_ranks\n"
    code += "env = detect_environment(os.environ)\n"
    code += "for purpose in ('prepare', 'prepare', 'train'): assert wait_for_all_ranks(env, purpose)"
    command = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "--no-python"]
    done = subprocess.run([sys.executable, "-m", *command, sys.executable, "-c", code], timeout=patience(120))
    assert done.returncode == 0


def test_a_process_that_was_started_again_comes_once() -> None:
    first, second, _ = places(3)
    waiting = rendezvous.Rendezvous(first, "train")
    for _ in range(2):
        rendezvous._counts.clear()  # another process
        rendezvous.Rendezvous(second, "train")
    assert waiting.arrived() == 2
    assert not waiting.complete(pytest.fail)


def test_processes_that_a_process_starts_meet_it_each_time() -> None:
    """A notebook calls `prepare` twice; each time its children are new."""
    for _ in range(2):
        first, second = places(2)
        met = rendezvous.Rendezvous(first, "prepare")
        of_the_parent, rendezvous._counts = rendezvous._counts, Counter()
        rendezvous.Rendezvous(second, "prepare")
        rendezvous._counts = of_the_parent
        assert met.arrived() == 2


def test_children_of_a_worker_of_torchrun_have_a_store_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert rendezvous.Rendezvous(places(2)[0], "prepare").arrived() == 1


@pytest.mark.parametrize(
    ("purpose", "join"), [("train", init_distributed), ("evaluate", lambda place: Ranks(place).__enter__())]
)
def test_a_rank_that_never_comes_is_named(purpose, join, impatient: None, caplog: pytest.LogCaptureFixture) -> None:
    first, _, last = places(3)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(rendezvous.wait_for_all_ranks, last, purpose)
        with pytest.raises(
            TransientError, match=r"rank 1 of 3 did not come in .* minutes; .*unset RANK and WORLD_SIZE"
        ):
            join(first)
        with pytest.raises(TransientError) as caught:
            other.result()
    assert caught.value.errors == []  # rank 0 reports it
    assert any(line.startswith("waiting for rank 1 of 3, ") for line in caplog.messages)


def test_so_is_rank_0(impatient: None, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TransientError, match=r"rank 0 of 2 at 127\.0\.0\.1:\d+ did not come"):
        init_distributed(places(2)[1])
    assert any(line.startswith("waiting for rank 0 of 2 at 127.0.0.1:") for line in caplog.messages)


def test_a_process_that_has_a_process_group_on_the_port_meets_others_there() -> None:
    first = places(2)[0]
    group, *_ = next(dist.rendezvous(f"tcp://127.0.0.1:{first.master_port}", 0, 1))
    assert rendezvous.Rendezvous(first, "train").arrived() == 1
    del group
