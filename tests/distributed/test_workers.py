"""`launch --local`: workers start together and end together, with the exit code that says why."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from machine import patience
from runs import ROOT, SUPPORT

from lcm_ds.distributed.workers import _is_running, run_with_restarts


def start(deeds, folder, processes=2, grace=5.0, **environment):
    """A launcher, in a process of its own, over workers that do `deeds` (see toy_worker.py)."""
    worker = [sys.executable, "-m", "toy_worker", deeds, str(folder)]
    script = "import sys; from lcm_ds.distributed.workers import run_local; " + (
        f"sys.exit(run_local({worker!r}, {processes}, grace={grace}))"
    )
    env = {**os.environ, "PYTHONPATH": f"{SUPPORT}:{ROOT}", **environment}
    env = {name: value for name, value in env.items() if value is not None}
    return subprocess.Popen(
        [sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def workers(folder, processes=2):
    """The state that each rank has written, once all have."""
    deadline = time.monotonic() + patience(30)
    while not all((folder / str(rank)).exists() for rank in range(processes)):
        assert time.monotonic() < deadline, "the workers did not start"
        time.sleep(0.02)
    return [json.loads((folder / str(rank)).read_text()) for rank in range(processes)]


def pids(folder, processes=2):
    return [pid for worker in workers(folder, processes) for pid in worker["pids"]]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(numbers, seconds):
    deadline = time.monotonic() + patience(seconds)
    while any(is_running(pid) for pid in numbers):
        assert time.monotonic() < deadline, f"still running: {[pid for pid in numbers if is_running(pid)]}"
        time.sleep(0.02)


def test_every_worker_is_told_its_place_and_its_output_passes_through(tmp_path):
    launcher = start("0=exit:0,1=exit:0", tmp_path)
    out, err = launcher.communicate(timeout=patience(60))
    assert launcher.returncode == 0, err
    places = [worker["place"] for worker in workers(tmp_path)]
    assert [place["RANK"] for place in places] == ["0", "1"]
    assert [place["LOCAL_RANK"] for place in places] == ["0", "1"]
    assert {place["WORLD_SIZE"] for place in places} == {"2"}
    assert {place["MASTER_ADDR"] for place in places} == {"127.0.0.1"}
    assert len({place["MASTER_PORT"] for place in places}) == 1
    assert "rank 0 of 2 says goodbye" in out
    assert "rank 1 of 2 says goodbye" in out


@pytest.mark.parametrize(("variable", "threads"), [(None, max(1, len(os.sched_getaffinity(0)) // 2)), ("7", 7)])
def test_cores_are_divided_unless_the_user_sets_the_number_of_threads(tmp_path, variable, threads):
    launcher = start("0=exit:0,1=exit:0", tmp_path, OMP_NUM_THREADS=variable)
    assert launcher.wait(timeout=patience(60)) == 0
    assert {worker["threads"] for worker in workers(tmp_path)} == {str(threads)}


@pytest.mark.parametrize(
    ("deeds", "code"), [("1=exit:1", 1), ("1=exit:2", 2), ("0=exit:75,1=exit:75", 75), ("1=exit:9", 1), ("1=kill", 1)]
)
def test_the_launcher_ends_with_the_code_of_the_worker_that_failed_first(tmp_path, deeds, code):
    launcher = start(deeds, tmp_path, grace=2.0)
    _, err = launcher.communicate(timeout=patience(60))
    assert launcher.returncode == code, err
    assert not any(is_running(pid) for pid in pids(tmp_path))
    if deeds == "1=kill":
        assert "rank 1" in err
        assert "SIGKILL" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_one_worker_ends_the_others_promptly(tmp_path, victim):
    launcher = start("0=sleep", tmp_path, processes=3)
    running = pids(tmp_path, 3)
    os.kill(running[victim], signal.SIGKILL)
    wait_until_gone(running, seconds=3)
    assert launcher.wait(timeout=patience(3)) == 1


def test_a_worker_that_does_not_listen_is_killed_after_the_grace(tmp_path):
    launcher = start("0=deaf,1=exit:1", tmp_path, grace=0.5)
    running = pids(tmp_path)
    wait_until_gone(running, seconds=5)
    assert launcher.wait(timeout=patience(3)) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_reaches_every_worker_and_their_75_is_awaited(tmp_path, number):
    launcher = start("0=stop,1=stop", tmp_path)
    workers(tmp_path)
    launcher.send_signal(number)
    _, err = launcher.communicate(timeout=patience(30))
    assert launcher.returncode == 75, err
    assert [(tmp_path / f"stopped-{rank}").read_text() for rank in (0, 1)] == [number.name] * 2
    assert err == ""


def test_no_worker_outlives_a_launcher_that_is_killed(tmp_path):
    launcher = start("0=deaf,1=stop", tmp_path)
    running = pids(tmp_path)
    launcher.kill()
    launcher.wait()
    wait_until_gone(running, seconds=3)


def test_what_a_worker_started_ends_with_it(tmp_path):
    launcher = start("0=spawn,1=exit:1", tmp_path)
    running = pids(tmp_path)
    assert len(running) == 3
    assert launcher.wait(timeout=patience(30)) == 1
    wait_until_gone(running, seconds=3)


@pytest.mark.parametrize(
    ("codes", "came_to", "expected"),
    [
        ([1, 1, 0], [5, 9], 0),
        ([1, 1, 1, 1, 1], [1, 2, 3], 1),
        ([1, 2], [1], 2),
        ([1, 75], [1], 75),
        ([1, 1, 0], [5, 5], 1),  # no progress
        ([0], [], 0),
    ],
)
def test_a_run_that_fails_is_started_again_as_long_as_that_helps(codes, came_to, expected, capfd):
    left, came_to = iter(codes), iter(came_to)
    code = run_with_restarts(lambda signals: next(left), lambda: next(came_to), max_restarts=3, backoff=0.001)
    assert code == expected
    restarts = len(codes) - len(list(left)) - 1
    assert capfd.readouterr().err.count(" of 3 in 0.001 s") == restarts  # no wait is longer than the first


def test_events_are_lines_of_json_and_all_else_goes_to_stderr(tmp_path):
    worker = [sys.executable, "-m", "toy_worker", "0=exit:1,1=deaf", str(tmp_path)]
    script = f"""
import sys
from lcm_ds.distributed.events import events
from lcm_ds.distributed.workers import run_with_restarts, run_local
events.emit("lost")
events.take_stdout()
print("printed")
run = lambda signals: run_local({worker!r}, 2, grace=0.5, signals=signals)
events.emit("end", code=run_with_restarts(run, iter([3, 3]).__next__, max_restarts=2, backoff=0.01), log=None)
"""
    env = {**os.environ, "PYTHONPATH": f"{SUPPORT}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(abs(event.pop("time") - time.time()) < patience(60) for event in found)
    failure = {"event": "failure", "origin": "rank 0", "message": "ended with exit code 1", "code": 1}
    restart = {"event": "restart", "number": 1, "of": 2, "seconds": 0.01, "progress": 3}
    assert found == [failure, restart, failure, {"event": "end", "code": 1}]
    assert "printed" in done.stderr


@pytest.mark.parametrize("when", ["while it runs", "between two starts"])
def test_a_run_that_was_asked_to_stop_is_not_started_again(tmp_path, when):
    deeds = "0=stop,1=exit:1" if when == "between two starts" else "0=deaf,1=stop"
    worker = [sys.executable, "-m", "toy_worker", deeds, str(tmp_path)]
    script = f"""
import sys
from lcm_ds.distributed.workers import run_with_restarts, run_local
run = lambda signals: run_local({worker!r}, 2, grace=0.5, signals=signals)
sys.exit(run_with_restarts(run, lambda: 1, max_restarts=3, backoff=60))
"""
    env = {**os.environ, "PYTHONPATH": f"{SUPPORT}:{ROOT}"}
    launcher = subprocess.Popen([sys.executable, "-c", script], env=env, stderr=subprocess.PIPE, text=True)
    workers(tmp_path)
    if when == "between two starts":
        lines = launcher.stderr.readline() + launcher.stderr.readline()
        assert "restart 1 of 3 in 60 s" in lines
    launcher.send_signal(signal.SIGTERM)
    _, err = launcher.communicate(timeout=patience(20))
    assert launcher.returncode == 75, err
    assert "restart" not in err


def test_a_worker_that_the_calling_program_has_reaped_is_not_running():
    worker = subprocess.Popen(["true"])
    os.waitpid(worker.pid, 0)
    assert not _is_running(worker)
