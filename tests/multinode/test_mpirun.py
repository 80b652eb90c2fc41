"""mpirun and torchrun start two ranks that train; mpirun's exit codes are the workers', and nothing outlives it."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from small_run import (
    EMBED_DIM,
    ENVIRON,
    STEPS,
    checkpoints,
    finish,
    losses,
    run_dir,
    start,
    wait_for,
    wait_for_step,
    with_variable,
    write_config,
)

from lcm_ds.distributed.environment import free_port

needs_mpirun = pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs the package openmpi-bin")
MPIRUN = {
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


@pytest.fixture
def dataset(synthetic_dataset):
    return synthetic_dataset(documents=300, embed_dim=EMBED_DIM)


@pytest.fixture
def mark(tmp_path):
    """A variable that all processes of a test have, so that those it leaves can be found."""
    return {"LCM_DS_TEST": str(tmp_path), "MASTER_PORT": str(free_port())}


def processes(mark):
    return with_variable("LCM_DS_TEST", mark["LCM_DS_TEST"])


def nothing_left(mark):
    wait_for(lambda: not processes(mark), 15, lambda: f"still there: {processes(mark)}")


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("program", "size"), [("mpirun.openmpi", "OMPI_COMM_WORLD_SIZE"), ("mpiexec.mpich", "PMI_SIZE")]
)
def test_a_signal_under_mpirun_saves_and_the_run_goes_on(dataset, tmp_path, mark, program, size):
    if shutil.which(program) is None:
        pytest.skip(f"needs {program}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/mpirun").write_text(f'#!/bin/sh\nexec {program} "$@"\n')
    (tmp_path / "bin/mpirun").chmod(0o755)
    mark["PATH"] = f"{tmp_path}/bin:{ENVIRON['PATH']}"
    config = write_config(dataset, tmp_path)
    launcher = start("lcm-ds", "launch", "--mpi", 2, config, **MPIRUN, **mark)
    wait_for_step(config, 20)
    assert len(with_variable(size, "2") & processes(mark)) == 2
    launcher.send_signal(signal.SIGTERM)
    code, out = finish(launcher)
    assert code == 75, out
    (stopped_at,) = checkpoints(config)
    assert 20 <= stopped_at < STEPS
    assert not (run_dir(config) / "STOP").exists()
    nothing_left(mark)

    code, out = finish(start("lcm-ds", "launch", "--mpi", 2, config, **MPIRUN, **mark))
    assert code == 0, out
    assert f"step {stopped_at} of {STEPS}" in out
    assert list(losses(config)) == list(range(1, STEPS + 1))
    nothing_left(mark)


@needs_mpirun
@pytest.mark.slow
def test_a_signal_while_the_ranks_begin_is_not_lost(dataset, tmp_path, mark):
    config = write_config(dataset, tmp_path, steps=100_000)
    launcher = start("launch/openmpi.sh", config, PROCESSES="2", **MPIRUN, **mark)
    wait_for(lambda: with_variable("OMPI_COMM_WORLD_RANK", "0") & processes(mark), 60)
    launcher.send_signal(signal.SIGTERM)
    code, out = finish(launcher)
    assert code == 75, out
    assert len(checkpoints(config)) == 1
    nothing_left(mark)


@needs_mpirun
@pytest.mark.slow
def test_what_a_rank_finds_wrong_comes_back_through_mpirun_as_2(dataset, tmp_path, mark):
    broken = shutil.copytree(dataset, tmp_path / "dataset")
    shard = sorted(broken.glob("*.tar"))[3]
    original = shard.read_bytes()
    shard.write_bytes(original[: len(original) // 2] + bytes(len(original) - len(original) // 2))  # of the same size
    config = write_config(broken, tmp_path)
    code, out = finish(start("launch/openmpi.sh", config, PROCESSES="2", **MPIRUN, **mark))
    assert code == 2, out
    assert str(shard) in out
    nothing_left(mark)


@needs_mpirun
@pytest.mark.slow
def test_the_death_of_one_rank_ends_the_others_under_mpirun(dataset, tmp_path, mark):
    config = write_config(dataset, tmp_path, steps=100_000)
    launcher = start("lcm-ds", "launch", "--openmpi", 2, config, **MPIRUN, **mark)
    wait_for_step(config, 5)
    (victim,) = processes(mark) & with_variable("OMPI_COMM_WORLD_RANK", "1")
    os.kill(victim, signal.SIGKILL)
    code, out = finish(launcher)
    assert code == 1, out
    nothing_left(mark)


@needs_mpirun
@pytest.mark.slow
@pytest.mark.parametrize("killed", ["the launcher", "mpirun"])
def test_nothing_outlives_a_launcher_of_mpirun_or_an_mpirun_that_is_killed(dataset, tmp_path, mark, killed):
    config = write_config(dataset, tmp_path, steps=100_000)
    launcher = start("lcm-ds", "launch", "--openmpi", 2, config, **MPIRUN, **mark)
    wait_for_step(config, 5)
    (mpirun,) = children(launcher.pid)
    os.kill(launcher.pid if killed == "the launcher" else mpirun, signal.SIGKILL)
    code, out = finish(launcher)
    assert code == (-signal.SIGKILL if killed == "the launcher" else 1), out
    nothing_left(mark)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_and_mpirun_train_as_local_does(dataset, tmp_path, mark):
    ways = {
        "local": (["lcm-ds", "launch", "--local", 2], {}),
        "torchrun": (["launch/torchrun.sh"], {"DEVICES": "2", "PORT": mark["MASTER_PORT"]}),
    }
    if shutil.which("mpirun") is not None:
        ways["mpirun"] = (["launch/openmpi.sh"], {"PROCESSES": "2", **MPIRUN})
    curves = {}
    for way, (command, environment) in ways.items():
        (tmp_path / way).mkdir()
        config = write_config(dataset, tmp_path / way, steps=40)
        code, out = finish(start(*command, config, **mark, **environment))
        assert code == 0, out
        curves[way] = losses(config)
    assert list(curves["local"]) == list(range(1, 41))
    assert all(curve == curves["local"] for curve in curves.values())
    nothing_left(mark)
