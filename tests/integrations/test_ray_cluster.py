"""`prepare --on ray` makes the dataset that `prepare` alone makes, on a real cluster, whatever happens to its nodes."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from machine import patience
from preparing import SECONDS, HashEncoder, written
from runs import SUPPORT
from tiny_sonar import save_tiny_sonar

from lcm_ds.errors import InputError, RunFailedError
from lcm_ds.integrations import ray as on_ray
from lcm_ds.prepare import pipeline, texts
from lcm_ds.prepare.shares import make_share

ray = pytest.importorskip("ray", reason="needs the extra ray")
import hash_on_ray  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402


@pytest.fixture(scope="module")
def cluster():
    """A head without room for an encoder, which the driver joins, and two nodes with room for one each."""
    # No reports to Ray's makers, and no yielding to other tests (a niceness of 15).
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    os.environ.update(settings)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        made.add_node(num_cpus=1)
    yield made
    ray.shutdown()
    made.shutdown()
    for name in settings:
        del os.environ[name]


@pytest.fixture
def joined(cluster, monkeypatch):
    """The cluster, joined by this process, its actors with the HashEncoder."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), *sys.path]))
    monkeypatch.setattr(on_ray, "Maker", hash_on_ray.HashMaker)
    monkeypatch.setattr(on_ray, "REMIND_SECONDS", 2.0)
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
    yield cluster
    ray.shutdown()


def after(condition, action):
    """Do something in a thread, once a condition holds."""

    def wait():
        deadline = time.monotonic() + patience(60)
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def units_in(config):
    path = Path(config.output) / "units.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_a_node_that_is_killed_changes_nothing_in_the_dataset(joined, config, tmp_path, monkeypatch, capsys):
    pipeline.prepare(config("alone", dtype="int8"), HashEncoder())
    ours = config("ray", dtype="int8")
    with monkeypatch.context() as patch:
        patch.setattr(texts, "load_encoder", lambda config: HashEncoder())
        make_share(ours, 0, 6)  # two units that are not committed yet
    capsys.readouterr()
    monkeypatch.setenv(SECONDS, "0.1")

    def kill_a_node():
        (node,) = [node for node in joined.worker_nodes if (tmp_path / f"ray.{node.node_id}").exists()][:1]
        joined.remove_node(node, allow_graceful=False)

    killer = after(lambda: units_in(ours) >= 5, kill_a_node)
    on_ray.prepare(ours)
    killer.join()
    printed = capsys.readouterr().out
    assert "encoding: 80 documents in 2 processes" in printed
    assert re.search(r"^maker-\d .*is lost: .*; its units are made again$", printed, re.MULTILINE), printed
    assert written(tmp_path / "ray") == written(tmp_path / "alone")


@pytest.mark.slow
def test_each_actor_has_a_gpu_of_its_own_where_the_cluster_has_gpus(joined, config, tmp_path, monkeypatch):
    """Ray's own count of GPUs is what it is told; the encoder runs on the CPU if there is no real one."""
    monkeypatch.setenv(SECONDS, "0.4")  # a unit, so that the second actor is there before all are made
    node = joined.add_node(num_cpus=4, num_gpus=2)
    try:
        on_ray.prepare(config("ray", split_workers=1))
        monkeypatch.delenv(SECONDS)
        pipeline.prepare(config("alone"), HashEncoder())
    finally:
        joined.remove_node(node)
    assert {*(tmp_path / f"ray.{node.node_id}").read_text().split()} == {"0", "1"}
    assert written(tmp_path / "ray") == written(tmp_path / "alone")


@pytest.mark.slow
def test_an_interrupted_preparation_resumes_without_ray(joined, config, tmp_path, monkeypatch, capsys):
    pipeline.prepare(config("alone"), HashEncoder())
    ours = config("ray", processes=1)
    monkeypatch.setenv(SECONDS, "0.1")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    stop = after(lambda: units_in(ours) >= 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        on_ray.prepare(ours)
    stop.join()
    signal.signal(signal.SIGINT, before)
    assert 3 <= units_in(ours) < 12
    pipeline.prepare(ours, HashEncoder())
    assert "resuming after" in capsys.readouterr().out
    assert written(tmp_path / "ray") == written(tmp_path / "alone")


@pytest.mark.slow
def test_actors_that_die_one_after_the_other_end_it(joined, config, monkeypatch):
    monkeypatch.setattr(on_ray, "Maker", hash_on_ray.DyingMaker)
    monkeypatch.setattr(on_ray, "MORE_DEATHS", 0)
    with pytest.raises(
        RunFailedError,
        match=r": 2 processes on Ray were lost without .*; the last: maker-1 on [\d.]+ is lost: .*has died",
    ):
        on_ray.prepare(config("dying", processes=1))


@pytest.mark.slow
def test_what_an_actor_finds_wrong_is_told_in_a_line(joined, config, monkeypatch, tmp_path):
    ours = config("wrong")
    monkeypatch.setattr(on_ray, "Maker", hash_on_ray.BlindMaker)
    with pytest.raises(InputError, match=r"gone: No such file or directory on .*: the nodes of a Ray cluster have to"):
        on_ray.prepare(ours)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.slow
def test_the_command_joins_the_cluster_that_runs(cluster, config, tmp_path, documents):
    encoder, _ = save_tiny_sonar(tmp_path)
    changes = {"encoder": {"name": "sonar", "model": str(encoder)}, "documents_per_shard": 24}
    config("ray", **changes)
    environ = {**os.environ, "RAY_ADDRESS": cluster.address}
    command = [sys.executable, "-m", "lcm_ds.cli", "prepare", f"{tmp_path}/ray.yaml", "--on", "ray", "processes=1"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=patience(120), check=False)
    assert done.returncode == 0, done.stderr
    assert "encoding: 96 documents in 1 process" in done.stdout
    alone = config("alone", **changes)
    pipeline.prepare(alone.model_copy(update={"processes": 1}))
    assert written(tmp_path / "ray") == written(tmp_path / "alone")


@pytest.mark.slow
def test_datatroves_ray_executor_runs_the_stages(joined, config, tmp_path):
    pytest.importorskip("datatrove", reason="needs the extra datatrove")
    from datatrove.executor import RayPipelineExecutor
    from hash_on_datatrove import HashConcepts

    from lcm_ds.integrations.datatrove import FinishDataset

    pipeline.prepare(config("alone"), HashEncoder())
    ours = config("ours")
    environment = {"runtime_env": {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}}}
    options = {"mem_per_cpu_gb": 0.1, "ray_remote_kwargs": environment}
    encode = RayPipelineExecutor([HashConcepts(ours)], logging_dir=str(tmp_path / "encode"), **options)
    finish = RayPipelineExecutor([FinishDataset(ours)], logging_dir=f"{tmp_path}/finish", depends=encode, **options)
    finish.run()
    assert written(tmp_path / "ours") == written(tmp_path / "alone")


@pytest.mark.slow
def test_a_cluster_without_room_is_waited_for_until_a_stop_signal(cluster, config, tmp_path, monkeypatch, capsys):
    """Ray sets its own handler of SIGTERM, which would end this process at once with 15."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    monkeypatch.setattr(on_ray, "REMIND_SECONDS", 0.5)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    stop = after(ray.is_initialized, lambda: (time.sleep(2), os.kill(os.getpid(), signal.SIGTERM)))
    try:
        with pytest.raises(KeyboardInterrupt):
            on_ray.prepare(config("out", encoder={"name": "sentence-transformers", "model": "minilm", "threads": 5}))
    finally:
        stop.join()
        signal.signal(signal.SIGTERM, before)
    assert "waiting for a Ray cluster with room: a process needs 5 CPU of a node\n" in capsys.readouterr().out
    assert not ray.is_initialized()
    assert not (tmp_path / "out").exists()


def test_a_cluster_that_does_not_answer_is_named(config, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "nothing-there")
    with pytest.raises(InputError, match="--on ray: the cluster nothing-there cannot be joined: "):
        on_ray.prepare(config("nowhere"))


def test_it_is_one_process_and_has_texts(config, monkeypatch):
    with pytest.raises(InputError, match=r"source\.name: concepts: needs no encoder"):
        on_ray.prepare(config("adopted", source={"name": "concepts", "paths": ["x"]}, encoder=None))
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 12345}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InputError, match="started in 2 processes"):
        on_ray.prepare(config("twice"))
