"""Whatever is killed, whenever: the run resumes, and its losses are those of an undisturbed one."""

import random
import signal
import time

import psutil
import pytest
from machine import patience
from runs import finish, metrics, run_dir, start

VICTIMS = ("one rank", "all ranks", "the launcher")


def kill(launcher, victim, chance):
    """SIGKILL a run's processes; returns once all of them are gone."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    ranks = [child for child in children if "RANK" in child.environ()]
    victims = {"one rank": ranks and [chance.choice(ranks)], "all ranks": ranks, "the launcher": [launcher]}[victim]
    for process in victims or [launcher]:
        process.send_signal(signal.SIGKILL)
    out, err = launcher.communicate(timeout=patience(60))
    assert launcher.returncode != 0, out + err
    _, alive = psutil.wait_procs(children, timeout=patience(30))
    assert not alive


def disturbed(config, kills, chance):
    """A run that is killed `times` times, once per launch, and then ends undisturbed; how often while saving."""
    while_saving = 0
    for number in range(kills):
        before = max(metrics(config, "loss"), default=0)
        launcher = start("launch", "--local", 2, config)
        if number % 4 == 3:
            time.sleep(chance.uniform(0, 8))  # during the start
        else:
            while max(metrics(config, "loss"), default=0) <= before and launcher.poll() is None:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.5))
        assert launcher.poll() is None, launcher.communicate()
        saving = list((run_dir(config) / "checkpoints").glob("*.partial"))
        kill(launcher, VICTIMS[number % 3], chance)
        while_saving += bool(saving)
    code, out, err = finish(start("launch", "--local", 2, config))
    assert code == 0, out + err
    return while_saving


def check(make_config, kills, steps, seed):
    settings = {"steps": steps, "checkpoint": {"every": 2, "keep": 2}, "evaluate": {"every": None}}
    undisturbed, config = make_config(**settings), make_config(**settings)
    code, out, err = finish(start("launch", "--local", 2, undisturbed))
    assert code == 0, out + err
    while_saving = disturbed(config, kills, random.Random(seed))
    for key in ("loss", "grad_norm", "concepts", "val_loss"):
        assert metrics(config, key) == metrics(undisturbed, key)
    assert len(metrics(config, "loss")) == steps
    assert [path.name for path in sorted((run_dir(config) / "checkpoints").glob("step_*"))] == [
        f"step_{step:08d}" for step in (steps - 2, steps)
    ]
    return while_saving


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_a_dozen_times_has_bit_identical_losses(make_config):
    assert check(make_config, kills=12, steps=360, seed=2) > 0
