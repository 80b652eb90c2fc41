"""What Linux is asked for."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from machine import patience

from lcm_ds import processes
from lcm_ds.distributed.environment import ORPHANING_LAUNCHERS
from lcm_ds.processes import remove_left_over_locks


@pytest.fixture
def lock(tmp_path):
    path = tmp_path / "py311_cpu" / "some_extension" / "lock"
    path.parent.mkdir(parents=True)
    return path


def test_a_lock_that_a_process_holds_stays_and_goes_when_that_was_killed(lock, tmp_path):
    script = f"import os, time; os.open({str(lock)!r}, os.O_CREAT | os.O_EXCL); print(flush=True); time.sleep(100)"
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    holder.stdout.readline()
    assert remove_left_over_locks(tmp_path) == []
    assert lock.exists()
    holder.kill()
    holder.communicate()
    assert remove_left_over_locks(tmp_path) == [lock]
    assert not lock.exists()


def test_on_a_shared_file_system_a_lock_has_to_be_old(lock, tmp_path, monkeypatch):
    lock.touch()
    monkeypatch.setattr(processes, "_file_system", lambda path: "nfs4")
    assert remove_left_over_locks(tmp_path) == []
    os.utime(lock, (time.time() - 700,) * 2)
    assert remove_left_over_locks(tmp_path) == [lock]


def test_the_file_system_of_a_path_is_that_of_its_nearest_mount():
    assert processes._file_system(processes.Path("/proc/self/status")) == "proc"


@pytest.mark.parametrize("variable", ORPHANING_LAUNCHERS)
def test_a_worker_ends_with_the_launcher_that_would_leave_it_behind(variable):
    worker = (
        "import os, time; from lcm_ds.distributed.environment import *; exit_with_launcher(os.environ)\n"
        "print(os.getpid(), flush=True); time.sleep(100)"
    )
    launcher = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {worker!r}]); time.sleep(100)"
    environ = {**os.environ, variable: "0"}
    started = subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True, env=environ)
    pid = int(started.stdout.readline())
    started.kill()
    started.wait()
    deadline = time.monotonic() + patience(20)
    while _runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("ends", "code", "last"),
    [
        ("return 75", 75, None),
        ("return None", 0, None),
        ("sys.exit(2)", 2, None),
        ("sys.exit('no')", 1, "no"),
        ("raise ValueError('wrong')", 1, "ValueError: wrong"),
    ],
)
def test_a_program_ends_with_its_code_and_its_last_words_and_the_interpreter_is_not_taken_apart(ends, code, last):
    program = f"""
import atexit, sys
from threading import Thread
from time import sleep
from lcm_ds.processes import exit_with

class Part:
    def __del__(self, write=sys.stderr.write):
        write("taken apart")

part = Part()

def work():
    sleep(0.3)
    print("a thread")

def main():
    Thread(target=work).start()
    atexit.register(print, "registered")
    print("main")
    {ends}

exit_with(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stdout.split("\n") == ["main", "a thread", "registered", ""]
    assert (done.stderr.splitlines() or [None])[-1] == last


def _runs(pid):
    """Whether the process is there and no zombie: the init of a container may reap none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
