"""Fixtures that several areas share: small real runs, a tiny SONAR, outputs of Meta's code."""

import json
import urllib.request
from pathlib import Path

import pytest
import yaml
from runs import ROOT, finish, start
from safetensors.torch import load_file
from tiny_sonar import save_tiny_sonar

from lcm_ds.cli import main

EMBED_DIM = 16
GOLDEN = ROOT / "tests/fixtures/base_lcm_fairseq2.safetensors"


class S3Server:
    """A server that speaks S3 on this machine, which can be away for a while."""

    def __init__(self):
        self.port = 0
        self.start()

    def start(self):
        from moto.moto_server.threaded_moto_server import ThreadedMotoServer

        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()
        _, self.port = self._server.get_host_and_port()

    def stop(self):
        self._server.stop()

    def client(self):
        import boto3

        return boto3.client("s3")


@pytest.fixture
def s3(monkeypatch):
    """An `S3Server`; how to reach it and who is asking is in the environment."""
    from s3fs import S3FileSystem

    server = S3Server()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nowhere",
        "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
    }.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    urllib.request.urlopen(f"http://127.0.0.1:{server.port}/moto-api/reset", b"")  # buckets are the process's
    yield server
    S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="session")
def concepts(synthetic_dataset):
    """A training and a validation dataset of a few hundred short documents."""
    return {
        "train": synthetic_dataset(documents=300, embed_dim=EMBED_DIM, documents_per_shard=10, seed=1),
        "validation": synthetic_dataset(documents=40, embed_dim=EMBED_DIM, documents_per_shard=10, seed=2),
    }


@pytest.fixture(scope="session")
def make_config(concepts, tmp_path_factory):
    """Writes a train config for a tiny model; keyword arguments replace top-level keys, None removes one."""

    def make(**changes):
        folder = tmp_path_factory.mktemp("run")
        mapping = {
            "run_dir": str(folder / "run"),
            "seed": 7,
            "model": {
                "preset": "quickstart",
                "embed_dim": EMBED_DIM,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "dropout": 0.1,
            },
            "data": {
                "train": str(concepts["train"]),
                "validation": str(concepts["validation"]),
                "row_length": 32,
                "max_segment": 16,
            },
            "batch": {"rows_per_step": 8, "micro_batch_rows": 4},
            "noise_std": 0.05,
            "optim": {"lr": 2.0e-3, "schedule": {"name": "cosine", "warmup_steps": 5}},
            "steps": 40,
            "checkpoint": {"every": 1000},
            "evaluate": {"every": 20, "rows": 16},
            "log": {"every": 1},
            "deepspeed": "ds_configs/zero2_fp32.json",
        }
        mapping.update(changes)
        if "optim" not in changes and (mapping["steps"] or 40) <= 5:
            mapping["optim"] = {"lr": 2.0e-3}  # a warm-up as long as the run is refused
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in mapping.items() if value is not None}))
        return path

    return make


@pytest.fixture(scope="session")
def trained(make_config):
    """Runs a config to its end once per session for each (ranks, changes); returns the config's path."""
    runs = {}

    def train(ranks, **changes):
        key = json.dumps([ranks, changes], sort_keys=True)
        if key not in runs:
            config = make_config(**changes)
            code, out, err = finish(start("launch", "--local", ranks, config))
            assert code == 0, out + err
            runs[key] = config
        return runs[key]

    return train


@pytest.fixture
def call(capfd, monkeypatch):
    """`lcm-ds …` in this process, which has imported torch: for calls that end before anything is trained.

    call(*arguments) -> (exit code, stdout, stderr)
    """
    monkeypatch.chdir(ROOT)

    def call(*arguments):
        capfd.readouterr()
        code = main(list(map(str, arguments)))
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope="session")
def tiny_sonar(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of an encoder and a decoder with random weights and a real tokenizer."""
    return save_tiny_sonar(tmp_path_factory.mktemp("sonar"))


@pytest.fixture(scope="session")
def golden_path():
    return GOLDEN


@pytest.fixture(scope="session")
def golden():
    """Meta's weights, `input` → `output`, `prompt` → `generated`."""
    return load_file(GOLDEN)
