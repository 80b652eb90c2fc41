"""SIGTERM to any process of any rank: a checkpoint at the step on which all ranks agree, and exit code 75."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from machine import patience
from runs import ROOT, metrics, run_dir

from lcm_ds.distributed.environment import free_port

LAUNCHERS = {
    "deepspeed": [
        "deepspeed.launcher.runner",
        "--num_gpus",
        "2",
        "--master_port",
        "{port}",
        "--module",
        "lcm_ds.train",
    ],
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "{port}", "-m", "lcm_ds.train"],
    "plain": ["lcm_ds.train"],
}


def worker(launcher, rank):
    """The process of a launcher that is the worker of this rank."""
    for process in psutil.Process(launcher).children(recursive=True):
        if process.environ().get("RANK") == str(rank):
            return process.pid
    raise AssertionError(f"no worker of rank {rank}")


@pytest.mark.parametrize(
    "launcher",
    ["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in LAUNCHERS if name != "plain")],
)
def test_sigterm_ends_a_run_with_75_and_a_checkpoint_at_that_step(make_config, launcher):
    rows = {"rows_per_step": 8, "micro_batch_rows": 8 if launcher == "plain" else 4}
    config = make_config(steps=100_000, batch=rows, evaluate={"every": None}, optim={"lr": 1e-4})
    words = [word.format(port=free_port()) for word in LAUNCHERS[launcher]]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", *words, str(config)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not metrics(config, "loss"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    # Not to rank 0, if there is another.
    victim = process.pid if launcher == "plain" else worker(process.pid, 1)
    os.kill(victim, signal.SIGTERM)
    out, _ = process.communicate(timeout=patience(60))
    (saved,) = (run_dir(config) / "checkpoints").glob("step_*")
    assert (saved / "COMPLETE").exists(), out
    assert int(saved.name.removeprefix("step_")) == max(metrics(config, "loss")), out
    assert "stopped at step" in out
    if launcher == "torchrun":  # it always exits with 1 and reports its workers' exit code
        assert process.returncode == 1
        assert "exitcode  : 75" in out
    else:
        assert process.returncode == 75, out


@pytest.fixture
def start_alone(make_config):
    """Starts a run of one rank that would take long: (process, config)."""
    started = []

    def start(**environment):
        rows = {"rows_per_step": 8, "micro_batch_rows": 4}
        config = make_config(steps=100_000, batch=rows, evaluate={"every": None})
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **environment}
        started.append(subprocess.Popen([sys.executable, "-m", "lcm_ds.train", str(config)], cwd=ROOT, env=env))
        return started[-1], config

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_rank_that_waits_for_another_at_the_start_ends_at_once(start_alone):
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process, config = start_alone(**variables)
    while not (run_dir(config) / "log.txt").exists():
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=patience(2)) == 75


# The hash takes a minute in which Python runs no handler of the main thread.
IN_C = """
import hashlib
from lcm_ds.train.reliability.stop_signal import StopRequest
StopRequest().steps_begin()
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)
"""


def test_a_second_sigint_ends_a_process_that_is_in_c_code():
    process = subprocess.Popen([sys.executable, "-c", IN_C], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=patience(5)) == -signal.SIGINT


def test_a_second_sigint_ends_a_process_without_saving(start_alone):
    process, config = start_alone()
    while not metrics(config, "loss"):
        time.sleep(0.05)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    assert process.wait(timeout=patience(10)) == -signal.SIGINT
    assert not list((run_dir(config) / "checkpoints").glob("*/COMPLETE"))
