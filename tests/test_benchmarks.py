"""Every benchmark runs, with small sizes."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from machine import patience

from lcm_ds.config import TrainConfig, load
from lcm_ds.deepspeed_config import accumulation_steps

ROOT = Path(__file__).parent.parent
# script → the options of each call, with small sizes
RUNS = {
    "adopt": ["--concepts 3000 --embed-dim 16 --row-group 20 --repeats 1 --folder {folder}"],
    "checkpoint": ["--preset quickstart --ranks 1 --stages 1 --folder {folder}"],
    "count_kernels": ["--layers 2"],
    "encode": [
        "--sentences 40 --repeats 1 --split-workers 5",
        "--encoder sonar-random --layers 1 --sentences 40 --repeats 1 --ways way",
    ],
    "engines": [
        "--config {folder}/prepare.yaml --repeats 1 --processes 1 source.take_sentences=500 documents_per_shard=1"
    ],
    "generate": ["--preset quickstart --concepts 8 --batches 1 2 --repeats 1 --rounds 1"],
    "loader": ["--concepts 40000 --embed-dim 16 --seconds 0.05", "--plan"],
    "mixing": ["--documents 20000 --shards 100 --topics 100 --rows 4"],
    "prepare": ["--config {folder}/prepare.yaml --repeats 1"],
    "quantization": ["{dataset} --concepts 500"],
    "ranks": ["--layers 1 --rows 2 --row-length 8 --steps 1 --repeats 1 --stages 1"],
    "retrieval": [
        "--targets 50 --candidates 3000 --repeats 1",
        "--evaluation --training 20000 --targets 500 --embed-dim 16 --folder {folder}",
    ],
    "sentences": ["--documents 2 --repeats 1"],
    "train_step": [
        "--preset quickstart --rows 2 --row-length 16 --documents --steps 1 "
        "--ways plain 'LCM, fp32' padded Llama design 'lcm-ds train, bf16, compiled'"
    ],
}
# script → text in its tables: one alternative of each kind
SHOWN = {
    "adopt": [
        "| read by pyarrow alone |",
        "| adopted |",
        "| written by pyarrow alone |",
        "| exported |",
        "memory, MiB",
    ],
    "checkpoint": ["| 1 | waiting |", "| 1 | in the background |"],
    "count_kernels": ["eager, 2 layers", "generated kernels", "eager on a GPU"],
    "encode": [
        "in order, float32",
        "device only, float32",
        "device only, bfloat16",
        ", openvino |",
        "all the way",
        "sonar-random on",
    ],
    "engines": ["| lcm-ds prepare --on ray |", "| datatrove, local executor |", "all shards have the same checksums"],
    "generate": ["| 2 | recomputing |", "| 2 | cached |", "| 2 | 512 |"],
    "loader": ["webdataset .decode(), 2", "Loader, verify: size, 1", "datasets, arrow, 0", "cold", "ready in"],
    "mixing": ["| lcm-ds |", "webdataset, buffer of 1000"],
    "prepare": ["lcm-ds prepare, all of it", "encoder busy", "MiB for"],
    "quantization": ["cosine", "bytes a concept"],
    "ranks": ["| DDP of torch, 2 ranks |", "| lcm-ds, ZeRO-1, 1 rank of 2 threads |", "| lcm-ds, ZeRO-1, 2 ranks |"],
    "retrieval": ["| fp64 |", "| count_nearer |", "memory, MiB |", "| 2,000 |", "| 20,000 |"],
    "sentences": ["splitter: spacy", "splitter: icu", "splitter: none", "ICU's rules alone"],
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
@pytest.mark.timeout(900)
def test_what_runs_on_a_gpu_runs_whole_on_a_cpu_with_small_sizes(tmp_path):
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "benchmarks/gpu/run.py", "--out", str(tmp_path), "--seconds", str(patience(600))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=patience(800))
    assert done.returncode == 0, done.stdout + done.stderr
    parts = re.findall(r"^## (\w+): (\w+)", done.stdout, re.MULTILINE)
    assert parts == [("check", "done"), ("small", "done"), ("encode", "done")]
    assert "WRONG" not in done.stdout
    for kind in ("attention, 16 x 128", "dropout, compiled", "noise, fused", "model, attention: row, compiled"):
        assert f"| {kind}" in done.stdout
    assert re.search(r"^\| small \| [\d,]+ \| [\d.]+ \| ", done.stdout, re.MULTILINE)
    assert "sentences/s" in done.stdout


def test_the_runs_for_a_gpu_are_of_valid_configs_and_the_first_parts_fit():
    sys.path.insert(0, str(ROOT / "benchmarks/gpu"))
    try:
        import run as gpu
    finally:
        sys.path.pop(0)
    runs = [part.command[1:] for part in gpu.parts(True) if part.command[0].endswith("train.py")]
    assert len(runs) == 7
    for _, path, steps, *overrides in runs:
        config = load(TrainConfig, path, overrides)
        assert accumulation_steps(config.batch.rows_per_step, config.batch.micro_batch_rows, 1, path)
        assert int(steps) % 4 == 0  # a line of metrics.jsonl each, of which the first is warm-up
        assert int(steps) > 4
    assert sum(part.seconds for part in gpu.parts(True)[:5]) < 600


def test_a_wrong_kernel_fails_the_checks():
    code = "import sys; sys.path.insert(0, 'benchmarks/gpu'); import check; "
    code += "check.attend = lambda query, key, value, layout: query + key + value; "
    code += "check.dropout = check.noise = check.model = lambda: (); sys.exit(check.main())"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "TORCH_COMPILE_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.count("| WRONG |") == 3, done.stdout
    assert "| ok |" not in done.stdout


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
