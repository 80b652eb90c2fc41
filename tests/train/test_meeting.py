"""Who does not come to a run or an evaluation is named, and not waited for without end."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from lcm_ds.errors import Unavailable
from lcm_ds.evaluate.ranks import Ranks
from lcm_ds.train import meeting
from lcm_ds.train.engine import connect
from lcm_ds.train.place import Place, free_port


def places(size: int) -> list[Place]:
    port = free_port()
    return [Place(rank, size, rank, size, "127.0.0.1", port) for rank in range(size)]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "SECONDS_A_REMINDER", 0.5)
    monkeypatch.setattr(meeting, "PATIENCE_SECONDS", 1.0)


def test_all_that_come_have_met() -> None:
    with ThreadPoolExecutor(3) as pool:
        met = list(pool.map(meeting.meet, places(3)))
    assert [each is not None and each.place.rank for each in met] == [0, 1, 2]
    assert meeting.meet(places(1)[0]) is None


@pytest.mark.parametrize("join", [connect, lambda place: Ranks(place).__enter__()], ids=["train", "evaluate"])
def test_a_rank_that_never_comes_is_named(join, impatient: None, caplog: pytest.LogCaptureFixture) -> None:
    first, _, last = places(3)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(meeting.meet, last)
        with pytest.raises(Unavailable, match=r"rank 1 of 3 did not come in .* minutes; .*unset RANK and WORLD_SIZE"):
            join(first)
        with pytest.raises(Unavailable) as told:
            other.result()
    assert told.value.mistakes == []  # rank 0 says it
    assert any(line.startswith("waiting for rank 1 of 3, ") for line in caplog.messages)


def test_so_is_rank_0(impatient: None, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Unavailable, match=r"rank 0 of 2 at 127\.0\.0\.1:\d+ did not come"):
        connect(places(2)[1])
    assert any(line.startswith("waiting for rank 0 of 2 at 127.0.0.1:") for line in caplog.messages)


def test_a_process_that_has_a_process_group_on_the_port_meets_others_there() -> None:
    first = places(2)[0]
    group, *_ = next(dist.rendezvous(f"tcp://127.0.0.1:{first.master_port}", 0, 1))
    assert meeting.Meeting(first).arrived() == 1
    del group
