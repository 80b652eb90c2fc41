"""Every benchmark runs, with small sizes."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from machine import patience

ROOT = Path(__file__).parent.parent
# script → the options of each call, with small sizes
RUNS = {
    "checkpoint": ["--preset quickstart --ranks 1 --stages 1 --folder {folder}"],
    "encode": ["--sentences 40 --repeats 1", "--encoder sonar-random --layers 1 --sentences 40 --repeats 1 --ways way"],
    "generate": ["--preset quickstart --concepts 8 --batches 1 2 --repeats 1 --rounds 1"],
    "loader": ["--concepts 20000 --embed-dim 16 --seconds 0.05", "--plan"],
    "prepare": ["--config {folder}/prepare.yaml --repeats 1"],
    "quantization": ["{dataset} --concepts 500"],
    "train_step": [
        "--preset quickstart --rows 2 --row-length 16 --documents --steps 1 "
        "--ways plain 'LCM, fp32' padded Llama design 'lcm-ds train, bf16, compiled'"
    ],
}
# script → text in its tables: one alternative of each kind
SHOWN = {
    "checkpoint": ["| 1 | waiting |", "| 1 | in the background |"],
    "encode": ["in order, float32", "device only, float32", "device only, bfloat16", "all the way", "sonar-random on"],
    "generate": ["| 2 | recomputing |", "| 2 | cached |", "| 2 | 512 |"],
    "loader": ["webdataset .decode(), 2 workers", "Loader, 2 threads, first epoch", "cold", "plan ready in"],
    "prepare": ["lcm-ds prepare, all of it", "encoder busy", "MiB for"],
    "quantization": ["cosine", "bytes a concept"],
    "train_step": [
        "plain, fp32",
        "Base-LCM, fp32",
        "lcm-ds train, bf16, compiled",
        "padded batches",
        "LlamaModel",
        "BaseLCM's design",
    ],
}


def test_every_benchmark_has_a_small_run():
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts == set(RUNS) == set(SHOWN)


@pytest.mark.slow
@pytest.mark.parametrize("script", RUNS)
def test_a_small_run_prints_its_table(script, synthetic_dataset, tmp_path):
    config = {
        "output": "replaced",
        "source": {"name": "sample", "take_sentences": 200},
        "encoder": {"name": "sentence-transformers", "model": "minilm"},
        "split_workers": 0,
        "validation": 0.0,
    }
    (tmp_path / "prepare.yaml").write_text(yaml.safe_dump(config))
    names = {"folder": tmp_path, "dataset": synthetic_dataset(documents=60, embed_dim=16)}
    # Compiling takes minutes; other tests cover it.
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1"}
    printed = ""
    for words in RUNS[script]:
        command = [sys.executable, f"benchmarks/{script}.py", *shlex.split(words.format(**names))]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=patience(120))
        assert done.returncode == 0, done.stdout + done.stderr
        printed += done.stdout
    assert [shown for shown in SHOWN[script] if shown not in printed] == []
    assert "nan" not in printed
