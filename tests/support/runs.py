"""Starting runs as a user does, and reading their files."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from machine import patience
from started import Started

ROOT = Path(__file__).parent.parent.parent


def benchmark(name):
    """The module of a script in benchmarks/."""
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(*arguments, **environment):
    """`lcm-ds …` in a new process, on the CPU, with one thread per process."""
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "lcm_ds.cli", *map(str, arguments)]
    return Started(command, cwd=ROOT, env=env)


def finish(process, timeout=240):
    """(exit code, stdout, stderr) of a started process."""
    out, err = process.communicate(timeout=patience(timeout))
    return process.returncode, out, err


def write_tiny_config(dataset, folder, **changes):
    """The config of a run of two steps of a tiny model in this folder; keyword arguments replace top-level keys."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    mapping = {
        "run_dir": str(folder / "run"),
        "model": {"preset": "quickstart", "embed_dim": 16, **sizes},
        "data": {"train": str(dataset), "row_length": 16, "max_segment": 8},
        "batch": {"rows_per_step": 4, "micro_batch_rows": 2},
        "optim": {"lr": 1e-3},
        "steps": 2,
        "deepspeed": str(ROOT / "ds_configs/zero1_fp32.json"),
        **changes,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(mapping))
    return path


def run_dir(config):
    return Path(yaml.safe_load(config.read_text())["run_dir"])


def metrics(config, key):
    """{step: value} of one metric of the run."""
    path = run_dir(config) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["step"]: line[key] for line in lines if key in line}


SUPPORT = Path(__file__).parent  # on sys.path of the tests (pyproject.toml), not of processes that they start


def launch_workers(script, *arguments, ranks=2):
    """Workers of tests/support, started as `launch --local` starts a run's; they have to succeed.

    lcm_ds comes first, since it keeps mlflow from being imported by DeepSpeed.
    """
    run = "import lcm_ds, os, runpy, sys; del sys.argv[0]; sys.path[0] = os.path.dirname(sys.argv[0]); "
    run += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", run, str(SUPPORT / script), *map(str, arguments)]
    launcher = (
        f"import sys; from lcm_ds.distributed.workers import run_local; sys.exit(run_local({command!r}, {ranks}))"
    )
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", launcher], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
