"""The smallest run that still trains: its config, how it is started, and what it leaves."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml
from machine import patience
from started import Started

ROOT = Path(__file__).parent.parent.parent
STEPS = 300  # a few seconds: long enough to be stopped on the way
EMBED_DIM = 16
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "dropout": 0.1}

# As in a user's shell: `lcm-ds` and `python` of this environment come first. On the CPU, one thread a process.
ENVIRON = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
}


def write_config(dataset, folder, **changes):
    """The config of a run in this folder; keyword arguments replace top-level keys."""
    mapping = {
        "run_dir": str(folder / "run"),
        "seed": 7,
        "model": {"preset": "quickstart", "embed_dim": EMBED_DIM, **SIZES},
        "data": {"train": str(dataset), "row_length": 32, "max_segment": 16},
        "batch": {"rows_per_step": 8, "micro_batch_rows": 4},
        "noise_std": 0.05,
        "optim": {"lr": 2.0e-3, "schedule": {"name": "cosine", "warmup_steps": 5}},
        "steps": STEPS,
        "log": {"every": 1},
        "deepspeed": str(ROOT / "ds_configs/zero2_fp32.json"),
        **changes,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(mapping))
    return path


def start(*command, **environment):
    """A command, in a process of its own."""
    return Started(map(str, command), cwd=ROOT, env={**ENVIRON, **environment}, stderr=subprocess.STDOUT)


def finish(process, timeout=240):
    """(exit code, output) of a started process."""
    out, _ = process.communicate(timeout=patience(timeout))
    return process.returncode, out


def run_dir(config):
    return Path(yaml.safe_load(config.read_text())["run_dir"])


def losses(config):
    """{step: loss}, as far as the run has written them."""
    return losses_in(run_dir(config))


def losses_in(folder):
    """The same of a run in this folder."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    values = [json.loads(line) for line in lines if line.endswith("\n")]
    return {line["step"]: line["loss"] for line in values if "loss" in line}


def wait_for_step(config, step, seconds=120, explain=lambda: ""):
    """Wait until the run has done so many steps."""
    wait_for(lambda: max(losses(config), default=0) >= step, seconds, explain)


def checkpoints(config):
    """The steps of the run's complete checkpoints; there may be no others, except converted ones."""
    folders = sorted((run_dir(config) / "checkpoints").glob("step_*"))
    folders = [folder for folder in folders if folder.suffix != ".universal"]
    assert all((folder / "COMPLETE").exists() for folder in folders), folders
    return [int(folder.name.removeprefix("step_")) for folder in folders]


def wait_for(condition, seconds, explain=lambda: ""):
    """Wait until condition() holds and return what it gave; fail after so many seconds."""
    deadline = time.monotonic() + patience(seconds)
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not so after {seconds} s\n{explain()}"
        time.sleep(0.1)
    return value


def with_variable(name, value=None):
    """The processes of this machine that have this variable in their environment, with this value or with any."""
    wanted = b"\0" + (f"{name}=" if value is None else f"{name}={value}\0").encode()
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or not ours to look at
            if wanted in b"\0" + (process / "environ").read_bytes():
                found.add(int(process.name))
    return found
