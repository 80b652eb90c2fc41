"""Whatever is killed, whenever: the run resumes, and its losses are those of an undisturbed one.

LCM_DS_KILLS=50 pytest tests/train/test_kills.py kills ranks so often in place of three times.
"""

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from machine import patience
from runs import finish, metrics, run_dir, start

KILLS = int(os.environ.get("LCM_DS_KILLS", "3"))  # of ranks, under one launcher
LAUNCHER_MEMORY = 4 << 20  # bytes by which it may grow from the second kill on: glibc keeps what it freed


def wait_until(happened, launcher):
    deadline = time.monotonic() + patience(60)
    while not (found := happened()):
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return found


def ranks(launcher):
    """The processes of both ranks; none until both are there."""
    with_rank = []
    for child in psutil.Process(launcher.pid).children(recursive=True):
        try:
            with_rank += [child] if "RANK" in child.environ() else []
        except psutil.Error:  # it is going
            continue
    return with_rank if len(with_rank) == 2 else []


def checkpoints(config):
    return sorted((run_dir(config) / "checkpoints").glob("step_*/COMPLETE"))


def kill_ranks(launcher, config, before, number, chance):
    """SIGKILL one rank or both, in a step or while a checkpoint is written, once the run has come further.

    A launcher gives up if a start brings no checkpoint.
    """
    processes = wait_until(lambda: ranks(launcher), launcher)
    for _ in range(chance.randint(1, 3)):
        wait_until(lambda before=before: checkpoints(config)[-1:] > before, launcher)
        before = checkpoints(config)[-1:]
    time.sleep(chance.uniform(0, 0.05))
    if number % 3 == 1:
        wait_until(lambda: list((run_dir(config) / "checkpoints").glob("*.partial")), launcher)
    for process in [chance.choice(processes)] if number % 2 else processes:
        process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=patience(60))  # the launcher ends the other one
    assert not alive


def kill_launcher(launcher):
    """SIGKILL the launcher: its ranks end by themselves."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()
    launcher.communicate(timeout=patience(60))
    _, alive = psutil.wait_procs(children, timeout=patience(60))
    assert not alive


def in_shared_memory():
    """The files of /dev/shm that processes which are alive have in their memory: those of other tests."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            found |= {Path(line.split(maxsplit=5)[5]) for line in maps.read_text().splitlines() if "/dev/shm/" in line}
    return found


@pytest.mark.slow
@pytest.mark.timeout(300 + 60 * KILLS)
def test_a_run_whose_ranks_and_launcher_are_killed_again_and_again_has_bit_identical_losses(make_config):
    chance, steps = random.Random(2), 60 + 16 * KILLS  # a kill comes eight steps after a start at most, and a moment
    settings = {"steps": steps, "checkpoint": {"every": 2, "keep": 2}, "evaluate": {"every": None}}
    undisturbed, config = make_config(**settings), make_config(**settings)
    code, out, err = finish(start("launch", "--local", 2, undisturbed))
    assert code == 0, out + err

    shared = {*Path("/dev/shm").iterdir()}
    launch = ("launch", "--local", 2, "--max-restarts", KILLS, "--back-off", 0.1, config)
    launcher = start(*launch)
    wait_until(lambda: ranks(launcher), launcher)
    time.sleep(chance.uniform(0, 3))  # during the start
    kill_launcher(launcher)
    launcher = start(*launch)
    wait_until(lambda: checkpoints(config), launcher)
    kill_launcher(launcher)
    launcher = start(*launch)
    memory = []
    for number in range(KILLS):
        kill_ranks(launcher, config, checkpoints(config)[-1:], number, chance)
        memory.append(psutil.Process(launcher.pid).memory_info().rss)
    code, out, err = finish(launcher)
    assert code == 0, out + err
    assert memory[-1] - memory[1] < LAUNCHER_MEMORY
    assert {*Path("/dev/shm").iterdir()} - in_shared_memory() <= shared

    for key in ("loss", "grad_norm", "concepts", "val_loss"):
        assert metrics(config, key) == metrics(undisturbed, key)
    assert len(metrics(config, "loss")) == steps
    assert [path.name for path in sorted((run_dir(config) / "checkpoints").glob("step_*"))] == [
        f"step_{step:08d}" for step in (steps - 2, steps)
    ]
