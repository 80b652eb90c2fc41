"""Hosts to train on, made once for all tests of this folder, and small runs for them."""

import subprocess
import sys

import pytest
from namespaces import ROOT, Hosts, why_not
from small_run import EMBED_DIM, losses_in, write_config


@pytest.fixture(scope="session")
def all_hosts(tmp_path_factory):
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(tmp_path_factory.mktemp("hosts"), 8) as made:
        yield made


@pytest.fixture
def hosts(all_hosts):
    """Eight hosts; a test that leaves a process on any of them fails."""
    yield all_hosts
    try:
        all_hosts.wait_until_idle(1)
    finally:
        for number in range(all_hosts.count):
            for pid in all_hosts.processes(number):
                subprocess.run(["kill", "-9", str(pid)], check=False)
            all_hosts.restore(number)


@pytest.fixture
def make_config(synthetic_dataset, tmp_path):
    """Writes the config of a run of eight steps under ZeRO-3; keyword arguments replace top-level keys."""
    defaults = {
        "batch": {"rows_per_step": 8, "micro_batch_rows": 2},
        "steps": 8,
        "checkpoint": {"every": 4},
        "deepspeed": str(ROOT / "ds_configs/zero3_fp32.json"),
    }
    dataset = synthetic_dataset(documents=300, embed_dim=EMBED_DIM, documents_per_shard=10, seed=1)
    return lambda **changes: write_config(dataset, tmp_path, **{**defaults, **changes})


@pytest.fixture(scope="session")
def local_losses(tmp_path_factory):
    """The losses of a config's run on two ranks of this machine, by `launch --local`."""
    known = []

    def train(config):
        if not known:
            run = tmp_path_factory.mktemp("local") / "run"
            command = [sys.executable, "-m", "lcm_ds.cli", "launch", "--local", "2", config, f"run_dir={run}"]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            known.append(losses_in(run))
        return known[0]

    return train
