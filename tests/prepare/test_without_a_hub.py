"""Preparing without a network: one line, at once, instead of the retries of the hub's libraries."""

import os
import socket
import subprocess
import sys

import pytest
from machine import patience
from runs import ROOT

FINEWEB = "configs/prepare/fineweb_edu_10bt.yaml"
SONAR = ("configs/prepare/quickstart.yaml", "encoder.name=sonar", "encoder.model=cointegrated/SONAR_200_text_encoder")


@pytest.fixture
def hub():
    """An address at which nobody answers, because nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken


@pytest.fixture
def prepare(hub, tmp_path):
    """prepare(*arguments) -> the finished command, with no hub and nothing in the cache."""

    def prepare(*arguments, timeout):
        hub_url = f"http://127.0.0.1:{hub.getsockname()[1]}"
        home = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        environ = {**os.environ, **home, "HF_ENDPOINT": hub_url, "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-m", "lcm_ds.cli", "prepare", *arguments, f"output={tmp_path / 'out'}"]
        return subprocess.run(
            command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=patience(timeout)
        )

    return prepare


@pytest.mark.parametrize("listens", [False, True])
def test_a_plan_does_not_wait_for_a_hub_that_does_not_answer(prepare, hub, listens):
    if listens:  # connections are made, and nobody reads from them
        hub.listen()
    done = prepare(FINEWEB, "--dry-run", "--rate", "1k", timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    reason = "timed out" if listens else "[Errno 111] Connection refused"
    assert lines["source"] == (
        "not there yet: source: HuggingFaceFW/fineweb-edu: cannot be opened: "
        f"http://127.0.0.1:{hub.getsockname()[1]}: {reason}"
    )
    assert {"encoder", "sentences", "rate", "free"} <= set(lines)


def test_a_plan_of_files_of_the_hub_names_the_hub_that_does_not_answer(prepare, hub):
    urls = "source.paths=[hf://datasets/a/b/*.parquet,hf://datasets/a/c/*.parquet]"
    done = prepare("configs/prepare/table.yaml", urls, "--dry-run", timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    reason = f"http://127.0.0.1:{hub.getsockname()[1]}: [Errno 111] Connection refused"
    assert done.stdout.splitlines()[0].endswith(f"hf://datasets/a/b/*.parquet: cannot be listed: {reason}")


def test_prepare_reports_a_model_that_cannot_be_fetched_in_one_line_with_the_encoder_that_needs_no_hub(prepare):
    done = prepare(*SONAR, timeout=60)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("model 'cointegrated/SONAR_200_text_encoder' is neither a folder")
    assert ": [Errno 111] Connection refused; " in line
    assert line.endswith("; without a hub use encoder.name=sentence-transformers encoder.model=minilm")


def test_prepare_reports_a_dataset_that_cannot_be_fetched_in_one_line(prepare, hub):
    done = prepare(FINEWEB, timeout=60)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    reason = f"http://127.0.0.1:{hub.getsockname()[1]}: [Errno 111] Connection refused"
    assert line == f"source: HuggingFaceFW/fineweb-edu: cannot be opened: {reason}"
