"""Workers on several hosts, over pdsh and ssh: started together, watched, ended together.

The hosts are two names of this machine: always with our own pdsh, and with the real one and an ssh server if they are
installed. tests/multinode/ has separate hosts.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from machine import patience
from runs import ROOT, SUPPORT
from started import Started

from lcm_ds.distributed.environment import free_port

# pdsh OPTIONS -w a,b COMMAND: on each host the command through a shell without the caller's variables, as over ssh.
PDSH = """#!{python}
import re, subprocess, sys, threading
words = sys.argv[1:]
hosts = words[words.index("-w") + 1].split(",")
command = " ".join(words[words.index("-w") + 2 :])
def copy(host, pipe, stream):
    for line in pipe:
        print(f"{{host}}: {{line}}", end="", file=stream, flush=True)
children = []
for number, host in enumerate(hosts):
    shown = re.sub("%([nh%])", lambda mark: {{"n": str(number), "h": host, "%": "%"}}[mark[1]], command)
    child = subprocess.Popen(
        ["sh", "-c", shown],
        env={{"PATH": "/usr/bin:/bin", "HOME": "/tmp", "SSH_CONNECTION": "127.0.0.1 1 127.0.0.1 22"}},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )
    for pipe, stream in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
        threading.Thread(target=copy, args=(host, pipe, stream)).start()
    children.append(child)
sys.exit(max(child.wait() for child in children))
"""
SSH = """#!/bin/sh
# ssh [-o OPTION] HOST COMMAND…, here
while [ "$1" = -o ]; do shift 2; done
shift
exec sh -c "$*"
"""


@pytest.fixture
def stand_in(tmp_path_factory):
    """Two names of this machine that our own pdsh reaches: the environment variables for it."""
    folder = tmp_path_factory.mktemp("hosts")
    for name, text in (("pdsh", PDSH.format(python=sys.executable)), ("ssh", SSH)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.slow)])
def hosts(request, tmp_path_factory):
    """The same, by the real pdsh and an ssh server as well."""
    if request.param == "stand-in":
        yield request.getfixturevalue("stand_in")
        return
    folder = tmp_path_factory.mktemp("hosts")
    sshd = shutil.which("sshd") or ("/usr/sbin/sshd" if Path("/usr/sbin/sshd").exists() else None)
    if sshd is None or shutil.which("pdsh") is None or os.geteuid() != 0:
        pytest.skip("needs root, openssh-server and pdsh")
    with running_sshd(sshd, folder):
        yield {"PATH": f"{folder}:{os.environ['PATH']}"}


class running_sshd:
    """An ssh server of our own, with keys of its own, that an `ssh` in `folder` knows."""

    def __init__(self, sshd, folder):
        port = free_port()
        for key in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
        (folder / "config").write_text(
            f"Port {port}\nUser root\nIdentityFile {folder}/user\nStrictHostKeyChecking no\n"
            f"UserKnownHostsFile /dev/null\nLogLevel ERROR\n"
        )
        (folder / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
        (folder / "ssh").chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)
        options = {
            "Port": port,
            "HostKey": folder / "host",
            "AuthorizedKeysFile": folder / "user.pub",
            "StrictModes": "no",
            "PermitRootLogin": "yes",
            "PidFile": "none",
            "UsePAM": "no",
        }
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        self.command, self.port = [sshd, "-D", "-f", "/dev/null", *words], port

    def __enter__(self):
        self.server = subprocess.Popen(self.command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + patience(10)
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline, "sshd does not answer"
                time.sleep(0.05)

    def __exit__(self, *exception):
        self.server.terminate()
        self.server.wait()


# The launcher over two names of this machine, as `launch --hostfile` calls it.
LAUNCHER = """
import os, sys
from pathlib import Path
from lcm_ds.launcher.multihost.restarts import run_on_hosts
from lcm_ds.launcher.task import LaunchOptions, LaunchTask
folder, port, restarts = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
task = LaunchTask(
    module="toy_worker",
    folder=folder / "run",
    stop_file=folder / "run/STOP" if "TOY_KNOWS_NO_STOP" not in os.environ else None,
    progress=lambda: len(list(folder.glob("progress-*"))),
)
options = LaunchOptions(silence=3, grace=1, max_restarts=restarts, back_off=0.1, master_port=port)
config = folder / "run/launch/config.yaml"
sys.exit(run_on_hosts(task, config, {"127.0.0.1": [0], "localhost": [0]}, "hostfile", options))
"""


def start(tmp_path, hosts, deeds, restarts=0, **environment):
    """A launcher of two toy workers (see toy_worker.py), in a process of its own."""
    (tmp_path / "run" / "launch").mkdir(parents=True, exist_ok=True)
    (tmp_path / "run" / "launch" / "config.yaml").write_text(f"{deeds} {tmp_path}")
    env = {**os.environ, **hosts, "PYTHONPATH": f"{SUPPORT}:{ROOT}", "DS_ACCELERATOR": "cpu", **environment}
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path), str(free_port()), str(restarts)]
    return Started(command, cwd=ROOT, env=env)


def workers(launcher, folder):
    """The state that each rank has written, once both have."""
    while not all((folder / str(rank)).exists() for rank in (0, 1)):
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.05)
    return [json.loads((folder / str(rank)).read_text()) for rank in (0, 1)]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(states, seconds):
    pids = [pid for worker in states for pid in worker["pids"]]
    assert pids
    deadline = time.monotonic() + patience(seconds)
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, [pid for pid in pids if is_running(pid)]
        time.sleep(0.05)


AWKWARD = """a b $HOME `id` "quoted" back\\slash 'single' %h %n 50% {x,y} ;|&*!"""


def test_workers_on_two_hosts_get_their_places_and_variables_and_their_exit_code_comes_back(tmp_path, hosts):
    launcher = start(tmp_path, hosts, "0=exit:2,1=exit:2", restarts=3, HF_AWKWARD=AWKWARD, HF_TOKEN="hf_secret")
    out, err = launcher.communicate(timeout=patience(120))
    assert launcher.returncode == 2, out + err  # and is not started again
    states = [json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    assert [worker["place"]["RANK"] for worker in states] == ["0", "1"]
    assert [worker["place"]["LOCAL_RANK"] for worker in states] == ["0", "0"]
    for worker in states:
        assert worker["variables"]["HF_AWKWARD"] == AWKWARD
        assert "HF_TOKEN" not in worker["variables"]
    assert "hf_secret" not in out + err
    assert "127.0.0.1 rank 0: rank 0 of 2 says goodbye" in out
    assert "localhost rank 1: rank 1 of 2 says goodbye" in out
    assert "rank 1 of 2 says goodbye" in (tmp_path / "run/launch/rank-00001.log").read_text()
    # Neither the token of the connection nor anything else of this start is left there.
    assert {path.name for path in (tmp_path / "run/launch").iterdir()} == {
        "config.yaml",
        "rank-00000.log",
        "rank-00001.log",
    }


def test_a_signal_becomes_the_file_stop_and_the_workers_75_is_awaited(tmp_path, hosts):
    launcher = start(tmp_path, hosts, "0=obey,1=obey")
    states = workers(launcher, tmp_path)
    launcher.send_signal(signal.SIGINT)
    out, err = launcher.communicate(timeout=patience(60))
    assert launcher.returncode == 75, out + err
    assert (tmp_path / "obeyed").exists()
    assert not (tmp_path / "run/STOP").exists()  # the next start would obey it, too
    wait_until_gone(states, 1)


def test_workers_that_look_for_no_file_are_sent_the_signal(tmp_path, stand_in):
    launcher = start(tmp_path, stand_in, "0=stop,1=stop", TOY_KNOWS_NO_STOP="")
    states = workers(launcher, tmp_path)
    launcher.send_signal(signal.SIGINT)
    out, err = launcher.communicate(timeout=patience(60))
    assert launcher.returncode == 75, out + err
    assert [(tmp_path / f"stopped-{rank}").read_text() for rank in (0, 1)] == ["SIGTERM"] * 2
    wait_until_gone(states, 1)


def test_the_first_error_is_told_last_with_its_host_and_its_log(tmp_path, stand_in):
    launcher = start(tmp_path, stand_in, "1=raise")
    states = workers(launcher, tmp_path)
    _, err = launcher.communicate(timeout=patience(60))
    assert launcher.returncode == 1
    *_, exception, last = err.splitlines()
    assert exception == "ValueError: the wrong number"
    log = tmp_path / "run/launch/rank-00001.log"
    assert last == f"lcm-ds launch: localhost rank 1 ended with exit code 1; its log: {log}"
    assert "ValueError: the wrong number" in log.read_text()
    wait_until_gone(states, 1)


def test_workers_end_by_themselves_when_the_launcher_is_killed(tmp_path, hosts):
    launcher = start(tmp_path, hosts, "0=stop,1=deaf")
    states = workers(launcher, tmp_path)
    launcher.kill()
    launcher.communicate()
    wait_until_gone(states, 5)
    assert (tmp_path / "stopped-0").read_text() == "SIGTERM"  # it may save; the deaf one was killed


def test_the_second_signal_ends_the_workers_and_the_third_kills_them(tmp_path, stand_in):
    launcher = start(tmp_path, stand_in, "0=deaf,1=deaf")
    states = workers(launcher, tmp_path)
    for _ in range(3):
        launcher.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    started = time.monotonic()
    _, err = launcher.communicate(timeout=patience(60))
    assert launcher.returncode == 1, err
    assert time.monotonic() - started < patience(10)
    assert "SIGKILL" in err.splitlines()[-1]
    wait_until_gone(states, 1)


@pytest.mark.parametrize(("deeds", "starts"), [("0=advance,1=sleep", 3), ("0=exit:1,1=exit:1", 2)])
def test_a_failed_run_is_started_again_as_often_as_asked_and_as_long_as_it_comes_further(
    tmp_path, stand_in, deeds, starts
):
    launcher = start(tmp_path, stand_in, deeds, restarts=2)
    _, err = launcher.communicate(timeout=patience(120))
    assert launcher.returncode == 1
    assert (tmp_path / "run/launch/rank-00000.log").read_text().count("---") == starts
    assert ("no progress since the last restart" in err.splitlines()[-1]) == (starts == 2)


def test_a_host_that_cannot_start_its_workers_ends_the_run_and_leaves_none(tmp_path, stand_in):
    (tmp_path / "run/launch/rank-00001.log").mkdir(parents=True)  # in the way of the log of rank 1
    launcher = start(tmp_path, stand_in, "0=sleep,1=sleep")
    _, err = launcher.communicate(timeout=patience(60))
    assert launcher.returncode == 1
    assert "rank-00001.log" in err
    for rank in (0, 1):
        if (tmp_path / str(rank)).exists():
            wait_until_gone([json.loads((tmp_path / str(rank)).read_text())], 5)
