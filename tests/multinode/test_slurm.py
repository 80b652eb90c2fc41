"""launch/slurm.sbatch in a real Slurm: a job stopped before its time limit goes on by itself, a cancelled one saves.

Two slurmd on this machine are two nodes (see slurm.py).
"""

import os
import signal
import socket
import sys

import pytest
import slurm
from preparing import HashEncoder, written
from runs import SUPPORT
from small_run import (
    EMBED_DIM,
    ROOT,
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

from lcm_ds.config import PrepareConfig
from lcm_ds.prepare.pipeline import prepare

pytestmark = pytest.mark.skipif(slurm.missing() is not None, reason=f"{slurm.missing()}")


@pytest.fixture(scope="module")
def cluster():
    with slurm.Supervisor() as running:
        yield running


@pytest.fixture
def make_config(synthetic_dataset, tmp_path):
    """Writes the config of a run in a folder of this name."""

    def make(name, **changes):
        (tmp_path / name).mkdir()
        return write_config(synthetic_dataset(documents=300, embed_dim=EMBED_DIM), tmp_path / name, **changes)

    return make


def log(config):
    """What the job has written."""
    path = config.parent / "job.log"
    return path.read_text() if path.exists() else ""


def stop_on_the_way(cluster, config, number, *command):
    """Call a command of Slurm's in the middle of the run."""
    wait_for_step(config, 20, explain=lambda: log(config) + cluster.logs())
    cluster(*command, number)


def wait_until_nothing_runs(cluster, number):
    wait_for(lambda: not cluster.processes(number), 60, cluster.logs)


def test_scancel_saves_and_ends_the_job_for_good(cluster, make_config):
    config = make_config("cancelled")
    number = cluster.submit(config)
    stop_on_the_way(cluster, config, number, "scancel")
    wait_until_nothing_runs(cluster, number)
    cluster.wait_for_job(number, 60, "CANCELLED")
    (step,) = checkpoints(config)
    assert 20 <= step < STEPS
    assert max(losses(config)) == step
    assert not (run_dir(config) / "STOP").exists()
    assert "(SIGTERM); checkpoint saved" in log(config)


@pytest.mark.parametrize("mpi", ["none", "pmi2", "pmix"])
def test_a_task_finds_its_rank_whatever_srun_offers_mpi(cluster, mpi):
    if not cluster("srun", f"--mpi={mpi}", "echo", "started"):
        pytest.skip(f"this Slurm cannot start tasks with --mpi={mpi}")
    code = (
        "import os; from lcm_ds.distributed.environment import detect_environment; e = detect_environment(os.environ); "
        "print(e.rank, e.world_size, e.local_rank, e.local_world_size, e.master_addr, e.master_port > 0)"
    )
    out = cluster("srun", "--nodes=2", "--ntasks-per-node=1", f"--mpi={mpi}", sys.executable, "-c", code)
    host = socket.gethostname().partition(".")[0]
    assert sorted(out.splitlines()) == [f"{rank} 2 0 1 {host} True" for rank in (0, 1)], out + cluster.logs()


def test_datatrove_stages_make_the_dataset_that_prepare_makes(cluster, monkeypatch, tmp_path):
    pytest.importorskip("datatrove", reason="needs the extra datatrove")
    from datatrove.executor import SlurmPipelineExecutor
    from hash_on_datatrove import HashConcepts

    from lcm_ds.integrations.datatrove import FinishDataset

    for name, value in cluster.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), str(ROOT)]))
    source = {"name": "sample", "take": 12}
    encoder = {"name": "sentence-transformers", "model": "minilm"}
    mapping = {"source": source, "encoder": encoder, "documents_per_shard": 1, "split_workers": 0, "validation": 0.2}
    ours, alone = (PrepareConfig(output=str(tmp_path / output), **mapping) for output in ("ours", "alone"))
    options = {"partition": "all", "time": "5", "mem_per_cpu_gb": 1}
    encode = SlurmPipelineExecutor([HashConcepts(ours)], tasks=3, logging_dir=f"{tmp_path}/encode", **options)
    finish = SlurmPipelineExecutor(
        [FinishDataset(ours)], tasks=1, logging_dir=f"{tmp_path}/finish", depends=encode, **options
    )
    finish.run()

    def logs():
        return cluster.logs() + "".join(path.read_text()[-3000:] for path in tmp_path.glob("*/slurm_logs/*"))

    wait_for(lambda: cluster.job(finish.job_id).get("JobState") in slurm.ENDED, 120, logs)
    assert cluster.job(finish.job_id)["JobState"] == "COMPLETED", logs()
    prepare(alone, HashEncoder())
    assert written(tmp_path / "ours") == written(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_signalled_job_goes_back_into_the_queue_and_resumes_as_if_nothing_had_been(cluster, make_config):
    config, uninterrupted = make_config("stopped"), make_config("uninterrupted")
    number = cluster.submit(config)
    stop_on_the_way(cluster, config, number, "scancel", "--batch", "--signal=USR1")
    cluster.wait_for_job(number, 60, "PENDING", restarts=1)
    assert "requeueing" in log(config)
    wait_until_nothing_runs(cluster, number)
    (stopped_at,) = checkpoints(config)
    assert 20 <= stopped_at < STEPS
    # Slurm would let a requeued job wait for two minutes; in the second of its requeue a node refuses it.
    cluster("scontrol", "update", f"JobId={number}", "StartTime=now+3")
    job = cluster.wait_for_job(number, 240, *slurm.ENDED, restarts=1)
    assert job["JobState"] == "COMPLETED", log(config) + cluster.logs()
    assert job["NumNodes"] == "2"
    assert f"step {stopped_at} of {STEPS}" in log(config)
    wait_until_nothing_runs(cluster, number)

    code, out = finish(start("lcm-ds", "launch", "--local", 2, uninterrupted))
    assert code == 0, out
    assert losses(config) == losses(uninterrupted)
    assert list(losses(uninterrupted)) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_slurm_signals_before_the_time_limit_and_the_job_goes_back_into_the_queue(cluster, make_config):
    config = make_config("limited", steps=100_000)
    # Slurm looks every half minute who is to be told within the next: here 20 to 50 s after the start.
    number = cluster.submit(config, "--time=1", "--signal=B:USR1@10")
    wait_for_step(config, 5, explain=lambda: log(config) + cluster.logs())
    ranks = cluster.processes(number) & with_variable("SLURM_STEP_ID", "0")
    assert len(ranks) == 2
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)  # Slurm's clock goes on, and the processors are free
    wait_for(lambda: "SIGUSR1: the ranks save and stop" in log(config), 120, lambda: log(config) + cluster.logs())
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)
    cluster.wait_for_job(number, 120, "PENDING", restarts=1)
    wait_until_nothing_runs(cluster, number)
    *_, step = checkpoints(config)
    assert max(losses(config)) == step
    assert "SIGUSR1: the ranks save and stop" in log(config)
    assert "requeueing" in log(config)
    cluster("scancel", number)


@pytest.mark.slow
def test_the_death_of_one_task_ends_the_job_on_both_nodes(cluster, make_config):
    config = make_config("struck", steps=100_000)
    number = cluster.submit(config)
    wait_for_step(config, 5, explain=lambda: log(config) + cluster.logs())
    (victim,) = cluster.processes(number) & with_variable("SLURM_PROCID", "1") & with_variable("SLURM_STEP_ID", "0")
    os.kill(victim, signal.SIGKILL)
    job = cluster.wait_for_job(number, 60, "FAILED")
    assert (job["ExitCode"], job["Restarts"]) == ("1:0", "0"), log(config)
    wait_until_nothing_runs(cluster, number)
