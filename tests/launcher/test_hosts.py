"""Hostfiles, what is taken of them, and the commands that start workers on other hosts."""

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

from lcm_ds.errors import InputError
from lcm_ds.launcher import remote
from lcm_ds.launcher.hosts import check_reachable, is_this_host, read_hostfile, select
from lcm_ds.train.place import free_port

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def mistakes_of(call, *arguments):
    with pytest.raises(InputError) as caught:
        call(*arguments)
    return caught.value.mistakes


# --- hostfiles --------------------------------------------------------------------------------------------------------


def test_a_hostfile_names_hosts_and_their_devices_in_order(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("# the cluster\n\nworker-1 slots=8\n  worker-0   slots=4  # the old one\nme@10.0.0.3 slots=1\n")
    assert list(read_hostfile(path).items()) == [("worker-1", 8), ("worker-0", 4), ("me@10.0.0.3", 1)]


def test_every_mistake_in_a_hostfile_is_told_with_its_line(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("a slots=2\nb\nc slots=two\na slots=2\nd slots=0\ne;rm slots=1\nf slots=1 extra\n")
    lines = mistakes_of(read_hostfile, path)
    assert [line.split(": ")[:2] for line in lines] == [[str(path), f"line {number}"] for number in (2, 3, 4, 5, 6, 7)]
    assert "line 1, too" in lines[2]


def test_a_hostfile_that_is_missing_or_empty_is_refused(tmp_path):
    (line,) = mistakes_of(read_hostfile, tmp_path / "none")
    assert str(tmp_path / "none") in line
    (tmp_path / "empty").write_text("# nobody\n")
    (line,) = mistakes_of(read_hostfile, tmp_path / "empty")
    assert "names no host" in line


def test_hosts_and_devices_are_included_and_excluded():
    hosts = {"a": 2, "b": 4}
    assert select(hosts) == {"a": [0, 1], "b": [0, 1, 2, 3]}
    assert select(hosts, include="b:0,2") == {"b": [0, 2]}
    assert select(hosts, exclude="a@b:3") == {"b": [0, 1, 2]}
    for include, exclude in (("c", ""), ("a:7", ""), ("", "a@b"), ("a", "b"), ("a:x", "")):
        (line,) = mistakes_of(select, hosts, include, exclude)
        assert line.startswith(("--include", "--exclude"))


def test_this_host_is_known_by_its_names_and_addresses():
    assert is_this_host("localhost")
    assert is_this_host("127.0.0.1")
    assert is_this_host(socket.gethostname())
    assert not is_this_host("192.0.2.1")  # set aside for documentation: nobody has it
    assert not is_this_host("no-such-host.invalid")


def test_hosts_that_ssh_does_not_reach_are_named_all_at_once():
    lines = mistakes_of(check_reachable, ["a.invalid", "b.invalid"], "hostfile")
    assert [line.split(": ")[:2] for line in lines] == [["hostfile", "a.invalid"], ["hostfile", "b.invalid"]]


# --- what travels -----------------------------------------------------------------------------------------------------


def test_variables_that_matter_travel_and_secrets_stay():
    environ = {
        "NCCL_DEBUG": "INFO",
        "HF_HOME": "/cache",
        "https_proxy": "http://proxy:3128",
        "PATH": "/usr/bin",
        "HF_TOKEN": "hf_x",
        "HTTP_PROXY": "http://me:secret@proxy:3128",
        "CUDA_VISIBLE_DEVICES": "0",
        "EDITOR": "vi",
    }
    assert set(remote.travelling(environ)) == {"NCCL_DEBUG", "HF_HOME", "https_proxy", "PATH"}


def test_the_users_own_deepspeed_env_goes_along_without_the_lines_that_deepspeed_cannot_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("# mine\n\nNCCL_DEBUG=WARN\nOTHER=1\n")
    remote.write_environment(tmp_path / "environment", {"NCCL_DEBUG": "INFO", "HF_HOME": "/a b"})
    assert (tmp_path / "environment").read_text() == "HF_HOME=/a b\nNCCL_DEBUG=WARN\nOTHER=1\n"


# --- DeepSpeed's runner -----------------------------------------------------------------------------------------------

# pdsh -S -f N -w a,b COMMAND…: for each host the command through a shell without the caller's variables, as over ssh.
PDSH = """#!{python}
import re, subprocess, sys
words = sys.argv[1:]
hosts = words[words.index("-w") + 1].split(",")
command = " ".join(words[words.index("-w") + 2 :])
def run(number, host):
    shown = re.sub("%([nh%])", lambda mark: {{"n": str(number), "h": host, "%": "%"}}[mark[1]], command)
    return subprocess.Popen(["sh", "-c", shown], env={{"PATH": "/usr/bin:/bin", "HOME": "/tmp"}})
sys.exit(max(child.wait() for child in [run(*pair) for pair in enumerate(hosts)]))
"""
SSH = """#!/bin/sh
# ssh [-o OPTION] HOST COMMAND…, here
while [ "$1" = -o ]; do shift 2; done
shift
exec sh -c "$*"
"""


@pytest.fixture(params=["stand-in", "real"])
def hosts(request, tmp_path_factory):
    """Two names of this machine that can be reached: environment variables, and the hosts' names."""
    folder = tmp_path_factory.mktemp("hosts")
    environ = {"PATH": f"{folder}:{os.environ['PATH']}"}
    if request.param == "stand-in":
        for name, text in (("pdsh", PDSH.format(python=sys.executable)), ("ssh", SSH)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        yield environ
        return
    sshd = shutil.which("sshd") or ("/usr/sbin/sshd" if Path("/usr/sbin/sshd").exists() else None)
    if sshd is None or shutil.which("pdsh") is None or os.geteuid() != 0:
        pytest.skip("needs root, openssh-server and pdsh")
    with running_sshd(sshd, folder):
        yield environ


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
        deadline = time.monotonic() + 10
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


def start(tmp_path, hosts, what, **environment):
    """DeepSpeed's runner over two names of this machine, one toy worker on each, as `launch --hostfile` calls it."""
    run_dir = tmp_path / "run"
    (run_dir / "launch").mkdir(parents=True)
    config = run_dir / "launch" / "config.yaml"
    config.write_text(f"{what} {tmp_path}")
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    script = (
        "import os, sys; from pathlib import Path; from lcm_ds.launcher import hosts, remote;"
        f"hosts.check_reachable(['127.0.0.1', 'localhost'], {str(hostfile)!r});"
        f"command = remote.deepspeed_command({str(hostfile)!r}, 'toy_worker', Path({str(config)!r}),"
        f"    master_addr='127.0.0.1', master_port={free_port()});"
        f"file = {str(run_dir / 'launch' / 'environment')!r};"
        "remote.write_environment(Path(file), os.environ);"
        f"sys.exit(remote.follow(command, {{**os.environ, 'DS_ENV_FILE': file}}, Path({str(run_dir / 'STOP')!r})))"
    )
    env = {**os.environ, **hosts, "PYTHONPATH": f"{HERE}:{ROOT}", "DS_ACCELERATOR": "cpu", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


AWKWARD = """a b $HOME `id` "quoted" back\\slash 'single' %h %n 50% {x,y} ;|&*!"""


def test_workers_on_two_hosts_get_their_places_and_variables_and_their_exit_code_comes_back(tmp_path, hosts):
    launcher = start(tmp_path, hosts, "0=exit:2,1=exit:2", HF_AWKWARD=AWKWARD, HF_TOKEN="hf_secret")
    out, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 2, out + err
    told = [json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    assert [worker["place"]["RANK"] for worker in told] == ["0", "1"]
    assert [worker["place"]["LOCAL_RANK"] for worker in told] == ["0", "0"]
    for worker in told:
        assert worker["variables"]["HF_AWKWARD"] == AWKWARD
        assert "HF_TOKEN" not in worker["variables"]
    assert "hf_secret" not in out + err + (tmp_path / "run/launch/environment").read_text()


def test_a_signal_becomes_the_file_stop_and_the_workers_75_is_awaited(tmp_path, hosts):
    launcher = start(tmp_path, hosts, "0=obey,1=obey")
    while not all((tmp_path / str(rank)).exists() for rank in (0, 1)):
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.05)
    launcher.send_signal(signal.SIGINT)
    out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 75, out + err
    assert not (tmp_path / "run/STOP").exists()


def test_paths_that_a_remote_shell_would_change_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    lines = mistakes_of(remote.deepspeed_command, "hostfile", "lcm_ds.train", Path("my runs/{a}/config.yaml"))
    assert any("pdsh is not installed" in line for line in lines)
    assert any("my runs/{a}/config.yaml" in line for line in lines)


# --- srun and mpirun --------------------------------------------------------------------------------------------------


def test_slurm_has_one_task_for_each_device():
    assert remote.slurm_tasks({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "6"}) == 6
    assert remote.slurm_tasks({"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}) == 16
    for environ, told in (
        ({}, "SLURM_JOB_ID"),
        ({"SLURM_JOB_ID": "1"}, "--ntasks-per-node"),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_GPUS_ON_NODE": "8"}, "--ntasks-per-node=8"),
    ):
        (line,) = mistakes_of(remote.slurm_tasks, environ)
        assert told in line


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs openmpi-bin")
@pytest.mark.parametrize(("what", "code"), [("0=exit:0,1=exit:0", 0), ("0=exit:75,1=exit:75", 75), ("1=exit:2", 2)])
def test_mpirun_starts_workers_and_their_exit_code_comes_back(tmp_path, what, code, monkeypatch):
    config = tmp_path / "config.yaml"
    config.write_text(f"{what} {tmp_path}")
    environ = {
        **os.environ,
        "PYTHONPATH": f"{HERE}:{ROOT}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }
    command = remote.openmpi_command(2, "toy_worker", config, environ)
    assert remote.follow(command, environ, tmp_path / "STOP") == code
    places = [json.loads((tmp_path / str(rank)).read_text())["place"] for rank in (0, 1)]
    assert [place["LOCAL_RANK"] for place in places] == ["0", "1"]
