"""Real launchers start two ranks that train together; those that are not installed here are skipped."""

import os
import shutil
import subprocess
import sys

import pytest
from runs import ROOT, write_tiny_config

from lcm_ds.distributed.environment import free_port

MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # of Open MPI 5
}
WORKER = ["-m", "lcm_ds.train"]
DEEPSPEED = ["--hostfile", "HOSTFILE", "--no_ssh_check", "--master_addr", "127.0.0.1", "--master_port", "PORT"]

# --cpu alone starts one process, whatever --num_processes is
ACCELERATE = [
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
]


@pytest.mark.parametrize(
    ("launcher", "worker"),
    [
        # passes --local-rank=N
        (["torch.distributed.launch", "--nproc-per-node", "2", "--master-port", "PORT"], WORKER),
        # passes --local_rank=N, in front of the command
        pytest.param(
            ["deepspeed.launcher.runner", *DEEPSPEED],
            [str(ROOT / "lcm_ds/cli.py"), "train"],
            marks=pytest.mark.slow,
            id="deepspeed",
        ),
        (["accelerate.commands.launch", *ACCELERATE, "--main_process_port", "PORT"], WORKER),
        pytest.param(["mpirun.openmpi", "-n", "2", sys.executable], WORKER, marks=pytest.mark.slow, id="openmpi"),
    ],
    ids=lambda words: words[0],
)
def test_workers_started_bare_train_as_two_ranks(tmp_path, launcher, worker, synthetic_dataset):
    program, *options = launcher
    module = program.partition(".")[0] if program.partition(".")[0] in ("torch", "deepspeed", "accelerate") else None
    if module is not None:
        pytest.importorskip(module)
    elif shutil.which(program) is None:
        pytest.skip(f"needs {program}")
    (tmp_path / "hostfile").write_text("localhost slots=2\n")
    port = str(free_port())
    values = {"HOSTFILE": str(tmp_path / "hostfile"), "PORT": port}
    config = write_tiny_config(synthetic_dataset(), tmp_path, log={"every": 1})
    start = [program] if module is None else [sys.executable, "-m", program]
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    environ = {**os.environ, **MPI, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "TERM": "xterm"}
    if module is None:
        environ["MASTER_PORT"] = port
    command = [*start, *(values.get(word, word) for word in options), *worker, str(config)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rank(s)" in done.stdout
    # also by Open MPI, which gives its processes pseudo-terminals of 0 × 0
    assert "\x1b" not in done.stdout
    assert any(line.startswith("step ") for line in done.stdout.splitlines())


@pytest.mark.skipif(shutil.which("mpiexec.mpich") is None, reason="needs mpich")
def test_processes_without_ranks_refuse_to_train_alone(tmp_path):
    """As under a PMI that only tells its size: nothing is started, and the line names what to set."""
    command = ["env", "-u", "PMI_RANK", "-u", "MPI_LOCALRANKID", sys.executable, "-m", "lcm_ds.train", "none.yaml"]
    done = subprocess.run(
        ["mpiexec.mpich", "-n", "2", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("environment: PMI_SIZE=2: started by a launcher") == 2
