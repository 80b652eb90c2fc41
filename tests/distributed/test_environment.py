"""A worker finds its place from whatever its launcher set."""

import json
import os
import subprocess
import sys

import pytest
from runs import ROOT, SUPPORT

from lcm_ds.distributed.environment import DistEnv, detect_environment, first_host, tasks_on_node
from lcm_ds.errors import InputError

RENDEZVOUS = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29512"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **RENDEZVOUS}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SRUN = {
    "SLURM_JOB_ID": "41234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
}


def mistakes_of(environ):
    with pytest.raises(InputError) as caught:
        detect_environment(environ)
    return caught.value.errors


def test_without_any_variable_the_run_has_one_process():
    place = detect_environment({})
    assert place == DistEnv(0, 1, 0, 1, "127.0.0.1", place.master_port)
    assert 0 < place.master_port < 2**16


def test_torchrun():
    assert detect_environment(TORCHRUN) == DistEnv(3, 4, 1, 2, "10.0.0.1", 29512)


def test_deepspeeds_launcher_has_another_name_for_the_local_world_size():
    environ = {**TORCHRUN, "LOCAL_SIZE": "2"}
    del environ["LOCAL_WORLD_SIZE"]
    assert detect_environment(environ) == detect_environment(TORCHRUN)


def test_a_pytorchjob_has_one_process_in_each_pod():
    assert detect_environment({"RANK": "3", "WORLD_SIZE": "4", **RENDEZVOUS}) == DistEnv(3, 4, 0, 1, "10.0.0.1", 29512)


def test_srun():
    assert detect_environment(SRUN) == DistEnv(3, 4, 1, 2, "gpu07", 20000 + 41234 % 12000)
    assert detect_environment({**SRUN, **RENDEZVOUS}) == DistEnv(3, 4, 1, 2, "10.0.0.1", 29512)


def test_a_batch_script_outside_srun_is_one_process_although_slurm_numbers_it():
    script = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    assert detect_environment({**script, "SLURM_PROCID": "0"}).world_size == 1


def test_mpirun():
    assert detect_environment({**OPENMPI, **RENDEZVOUS}) == DistEnv(3, 4, 1, 2, "10.0.0.1", 29512)
    (line,) = mistakes_of(OPENMPI)
    assert "MASTER_ADDR" in line
    on_one_host = {**OPENMPI, "OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    assert detect_environment(on_one_host) == DistEnv(3, 4, 3, 4, "127.0.0.1", 29500)


def test_torchrun_inside_srun_counts_for_itself():
    assert detect_environment({**SRUN, **TORCHRUN, "WORLD_SIZE": "8"}).world_size == 8


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"RANK": "0"}, ["WORLD_SIZE"]),
        ({"WORLD_SIZE": "2", **RENDEZVOUS}, ["RANK"]),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["MASTER_ADDR", "MASTER_PORT"]),
        ({**TORCHRUN, "RANK": "4"}, ["rank 4 of 4"]),
        ({**TORCHRUN, "RANK": "one"}, ["RANK='one'"]),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, ["world size is 0"]),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, ["local rank 2 of 2"]),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, ["MASTER_PORT=99999"]),
        ({**SRUN, "SLURM_NTASKS": "x", "SLURM_LOCALID": "y"}, ["SLURM_NTASKS='x'", "SLURM_LOCALID='y'"]),
        # left over in a shell: every task would take itself for the only process
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "1"}, ["contradict"]),
        ({**OPENMPI, **RENDEZVOUS, "RANK": "0", "WORLD_SIZE": "4"}, ["contradict"]),
    ],
)
def test_missing_and_contradictory_variables_are_named(environ, names):
    lines = mistakes_of(environ)
    assert len(lines) == len(names)
    for line, name in zip(lines, names, strict=True):
        assert line.startswith("environment: ")
        assert name in line


def test_the_first_host_of_a_slurm_list():
    assert first_host("n1") == "n1"
    assert first_host("n1,n2") == "n1"
    assert first_host("gpu[07-12,20],login") == "gpu07"
    assert first_host("rack[2,4]n[01-16]") == "rack2n01"


def test_the_tasks_on_each_node_of_a_slurm_list():
    assert [tasks_on_node("2(x3),1", node) for node in range(4)] == [2, 2, 2, 1]
    assert tasks_on_node("2(x3),1", 4) is None


@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"],
        [
            "deepspeed.launcher.runner",
            "--hostfile",
            "HOSTFILE",
            "--no_ssh_check",
            "--master_addr",
            "127.0.0.1",
            "--module",
        ],
    ],
    ids=["torchrun", "deepspeed"],
)
def test_workers_started_bare_find_their_places(tmp_path, launcher):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    words = [str(hostfile) if word == "HOSTFILE" else word for word in launcher]
    env = {**os.environ, "PYTHONPATH": f"{SUPPORT}:{ROOT}", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", *words, "toy_worker", "0=exit:0,1=exit:0", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    places = [json.loads((tmp_path / str(rank)).read_text())["place"] for rank in (0, 1)]
    assert [place["RANK"] for place in places] == ["0", "1"]
    assert [place["LOCAL_RANK"] for place in places] == ["0", "1"]
    assert {place["LOCAL_WORLD_SIZE"] for place in places} == {"2"}
