"""Hostfiles, selections of their devices, and the commands that start workers on other hosts."""

import json
import os
import shutil
import socket

import pytest
from runs import ROOT, SUPPORT

from lcm_ds.errors import InputError
from lcm_ds.launcher import schedulers
from lcm_ds.launcher.multihost.hostfile import is_this_host, read_hostfile, select


def mistakes_of(call, *arguments):
    with pytest.raises(InputError) as caught:
        call(*arguments)
    return caught.value.errors


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
    assert "already in line 1" in lines[2]


def test_a_hostfile_that_is_missing_or_empty_is_refused(tmp_path):
    (line,) = mistakes_of(read_hostfile, tmp_path / "none")
    assert str(tmp_path / "none") in line
    (tmp_path / "empty").write_text("# nobody\n")
    (line,) = mistakes_of(read_hostfile, tmp_path / "empty")
    assert "has no hosts" in line


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


# --- variables --------------------------------------------------------------------------------------------------------


def test_variables_that_matter_travel_and_secrets_stay():
    environ = {
        "NCCL_DEBUG": "INFO",
        "HF_HOME": "/cache",
        "https_proxy": "http://proxy:3128",
        "PATH": "/usr/bin",
        "HF_TOKEN": "hf_x",
        "TOKENIZERS_PARALLELISM": "false",
        "HTTP_PROXY": "http://me:secret@proxy:3128",
        "CUDA_VISIBLE_DEVICES": "0",
        "EDITOR": "vi",
    }
    assert set(schedulers.forwarded_variables(environ)) == {
        "NCCL_DEBUG", "HF_HOME", "https_proxy", "PATH", "TOKENIZERS_PARALLELISM",
    }  # fmt: skip


def test_the_users_own_deepspeed_env_goes_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("# mine\n\nNCCL_DEBUG=WARN\nOTHER=1\n")
    environ = {"NCCL_DEBUG": "INFO", "HF_HOME": "/a b"}
    assert schedulers.environment_of_workers(environ) == {"NCCL_DEBUG": "WARN", "HF_HOME": "/a b", "OTHER": "1"}


# --- srun and mpirun --------------------------------------------------------------------------------------------------


def test_slurm_has_one_task_for_each_device():
    assert schedulers.slurm_tasks({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "6"}) == 6
    assert schedulers.slurm_tasks({"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}) == 16
    for environ, expected in (
        ({}, "SLURM_JOB_ID"),
        ({"SLURM_JOB_ID": "1"}, "--ntasks-per-node"),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_GPUS_ON_NODE": "8"}, "--ntasks-per-node=8"),
    ):
        (line,) = mistakes_of(schedulers.slurm_tasks, environ)
        assert expected in line


@pytest.mark.parametrize("program", ["mpirun.openmpi", "mpiexec.mpich"])
@pytest.mark.parametrize(("deeds", "code"), [("0=exit:0,1=exit:0", 0), ("0=exit:75,1=exit:75", 75), ("1=exit:2", 2)])
def test_mpirun_starts_workers_and_their_exit_code_comes_back(tmp_path, deeds, code, monkeypatch, program):
    if shutil.which(program) is None:
        pytest.skip(f"needs {program}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/mpirun").write_text(f'#!/bin/sh\nexec {program} "$@"\n')
    (tmp_path / "bin/mpirun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    if program == "mpiexec.mpich" and deeds == "1=exit:2":
        deeds = "0=exit:2,1=exit:2"  # Hydra waits for the other one, which would notice a closed connection
    config = tmp_path / "config.yaml"
    config.write_text(f"{deeds} {tmp_path}")
    environ = {
        **os.environ,
        "PYTHONPATH": f"{SUPPORT}:{ROOT}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }
    found = schedulers.mpi_program("--mpi")
    assert found == ("mpirun", "Open MPI" if program == "mpirun.openmpi" else "Hydra")
    command = schedulers.mpi_command(found, 2, "toy_worker", config, environ)
    assert schedulers.run_scheduler(command, environ, tmp_path / "STOP") == code
    places = [json.loads((tmp_path / str(rank)).read_text())["place"] for rank in (0, 1)]
    assert [place["LOCAL_RANK"] for place in places] == ["0", "1"]
    assert {place["LOCAL_WORLD_SIZE"] for place in places} == {"2"}
