"""A worker finds its place from whatever its launcher set."""

import json
import os
import subprocess
import sys

import pytest
from runs import ROOT, SUPPORT

from lcm_ds.distributed.environment import LAUNCHERS, DistEnv, detect_environment, first_host, tasks_on_node
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


JSRUN = {
    "JSM_NAMESPACE_RANK": "3",
    "JSM_NAMESPACE_SIZE": "4",
    "JSM_NAMESPACE_LOCAL_RANK": "1",
    "JSM_NAMESPACE_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_FD": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
INTEL = {**HYDRA, "I_MPI_ROOT": "/opt/intel", "HYDRA_BSTRAP_LAUNCHER": "ssh"}
MVAPICH = {
    f"MV2_COMM_WORLD_{name}": value
    for name, value in zip(("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"), "3412", strict=True)
}
FLUX = {
    "FLUX_TASK_RANK": "3",
    "FLUX_JOB_SIZE": "4",
    "FLUX_TASK_LOCAL_ID": "1",
    "FLUX_JOB_NNODES": "2",
    "FLUX_JOB_ID": "f4Wb",
    "PMI_RANK": "3",
    "PMI_SIZE": "4",
}
PALS = {
    "PALS_RANKID": "3",
    "PALS_NODEID": "1",
    "PALS_LOCAL_RANKID": "1",
    "PALS_LOCAL_SIZE": "2",
    "PMI_RANK": "3",
    "PMI_SIZE": "4",
    "PMI_LOCAL_RANK": "1",
    "PMI_LOCAL_SIZE": "2",
}
BARE_PMI = {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"}
PMIX = {"PMIX_RANK": "3", "PMIX_NAMESPACE": "slurm.pmix.1.0"}
ROWS = {
    "LSF's jsrun": JSRUN,
    "Open MPI's mpirun": OPENMPI,
    "MPICH's or Intel MPI's mpiexec": HYDRA,
    "MVAPICH's mpirun_rsh": MVAPICH,
    "Slurm's srun": SRUN,
    "Flux": FLUX,
    "Cray PALS' mpiexec": PALS,
    "a launcher with PMI": BARE_PMI,
}


def test_every_row_of_the_table_has_a_source_and_is_tested_and_documented():
    assert [row.name for row in LAUNCHERS] == list(ROWS)
    assert all(row.source for row in LAUNCHERS)
    page = (ROOT / "docs/schedulers.md").read_text()
    documented = [
        line for line in page.splitlines() if (line.startswith("| ") and "_RANK" in line) or "SLURM_PROCID" in line
    ]
    for row in LAUNCHERS:
        names = (row.rank, *row.local_rank, *row.local_size)
        assert any(all(f"`{name}`" in line for name in names[:2]) for line in documented), row.name


@pytest.mark.parametrize("row", LAUNCHERS, ids=lambda row: row.rank)
def test_each_launcher_of_the_table_on_two_hosts(row):
    environ = ROWS[row.name]
    assert detect_environment({**environ, **RENDEZVOUS}) == DistEnv(3, 4, 1, 2, "10.0.0.1", 29512)
    if row.master_addr:  # Slurm tells it
        assert mistakes_of(environ) == [f"environment: MASTER_ADDR is missing: {row.master_addr}"]
    for name in {row.size[0], row.local_rank[0]} - {"SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"}:
        assert f"{name}='one'" in mistakes_of({**environ, **RENDEZVOUS, name: "one"})[0]


@pytest.mark.parametrize(
    ("name", "environ"),
    [
        # jsrun of Spectrum MPI also sets Open MPI's variables
        ("LSF's jsrun", {**OPENMPI, **JSRUN}),
        # started by their daemons, which Slurm has started as processes 0 and 1 of a step
        ("Open MPI's mpirun", {**SRUN, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", **PMIX, **OPENMPI}),
        ("MPICH's or Intel MPI's mpiexec", {**SRUN, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", **INTEL}),
        # srun --mpi=pmi2, --mpi=pmix and --mpi=cray_shasta
        ("Slurm's srun", {**SRUN, "PMI_RANK": "3", "PMI_SIZE": "4", "PMI_FD": "8"}),
        ("Slurm's srun", {**SRUN, **PMIX}),
        ("Slurm's srun", {**SRUN, **PALS}),
        ("Flux", {**FLUX, **PALS}),
    ],
)
def test_variables_of_several_launchers_give_the_same_ranks(name, environ):
    assert detect_environment({**environ, **RENDEZVOUS}) == DistEnv(3, 4, 1, 2, "10.0.0.1", 29512)
    if name != "Slurm's srun":
        (row,) = (row for row in LAUNCHERS if row.name == name)
        assert row.master_addr in mistakes_of(environ)[0]


def test_processes_of_one_host_meet_on_it():
    for environ, local in ((OPENMPI, "OMPI_COMM_WORLD_LOCAL_"), (JSRUN, "JSM_NAMESPACE_LOCAL_")):
        on_one_host = {**environ, f"{local}RANK": "3", f"{local}SIZE": "4"}
        assert detect_environment(on_one_host) == DistEnv(3, 4, 3, 4, "127.0.0.1", 29500)
    on_one_host = {**HYDRA, "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}
    assert detect_environment(on_one_host) == DistEnv(3, 4, 3, 4, "127.0.0.1", 29500)
    on_one_host = {**FLUX, "FLUX_TASK_LOCAL_ID": "3", "FLUX_JOB_NNODES": "1"}
    assert detect_environment(on_one_host) == DistEnv(3, 4, 3, 4, "127.0.0.1", 29500)


def test_a_launcher_that_gives_no_local_rank_is_refused_until_it_is_set():
    gforker = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_APPNUM": "0"}
    assert mistakes_of(gforker) == ["environment: PMI_LOCAL_RANK is missing"]
    assert detect_environment({**gforker, "LOCAL_RANK": "1"}) == DistEnv(1, 2, 1, 2, "127.0.0.1", 29500)


@pytest.mark.parametrize(
    "environ",
    [
        {"PMI_SIZE": "2"},
        {"MPI_LOCALNRANKS": "8"},
        {"PALS_LOCAL_SIZE": "4"},
        {"OMPI_COMM_WORLD_SIZE": "16"},
        {"FLUX_JOB_SIZE": "2"},
        {"PMIX_RANK": "0"},  # prterun, which tells the number of processes to nobody
        {"MPT_LRANK": "0"},
        {"ALPS_APP_PE": "3"},
    ],
)
def test_a_process_of_an_unknown_launcher_does_not_take_itself_for_the_only_one(environ):
    (line,) = mistakes_of(environ)
    ((name, value),) = environ.items()
    assert line.startswith(f"environment: {name}={value}: started by ")
    assert "set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT" in line
    assert detect_environment({**environ, "RANK": "0", "WORLD_SIZE": "1"}).world_size == 1


def test_a_launcher_of_one_process_starts_a_run_of_one():
    for environ in ({"PMI_SIZE": "1"}, {"PMI_RANK": "0", "PMI_SIZE": "1"}, {"OMPI_COMM_WORLD_SIZE": "1"}):
        assert detect_environment(environ).world_size == 1


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


def test_workers_of_torchrun_find_their_places(tmp_path):
    words = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    env = {**os.environ, "PYTHONPATH": f"{SUPPORT}:{ROOT}", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", *words, "toy_worker", "0=exit:0,1=exit:0", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    places = [json.loads((tmp_path / str(rank)).read_text())["place"] for rank in (0, 1)]
    assert [place["RANK"] for place in places] == ["0", "1"]
    assert [place["LOCAL_RANK"] for place in places] == ["0", "1"]
    assert {place["LOCAL_WORLD_SIZE"] for place in places} == {"2"}
