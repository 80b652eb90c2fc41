"""First contact with a GPU, in at most nine minutes: is it right, and how fast? Prints tables to send (`make gpu`).

python benchmarks/gpu/run.py [--seconds 530] [--out FOLDER]

The most valuable parts come first; what the time no longer allows is left out and named. Without a GPU everything runs
on the CPU, with small sizes. FOLDER holds the complete output of each part. Exits with 1 if a part failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import deepspeed
import torch
import transformers

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LEAST = 20.0  # seconds that a part needs to be begun
LINES = 30  # shown of a part


class Part(NamedTuple):
    """A script with its arguments."""

    name: str
    seconds: float  # at most
    command: list[str]


def parts(on_gpu: bool) -> list[Part]:
    """In the order of their value."""

    def train(name: str, seconds: float, config: str, steps: int, *overrides: str) -> Part:
        command = [str(HERE / "train.py"), name, str(ROOT / f"configs/train/{config}.yaml"), str(steps), *overrides]
        return Part(name, seconds, command)

    def batch(rows: int, micro_batch: int) -> list[str]:
        return [f"batch.rows_per_step={rows}", f"batch.micro_batch_rows={micro_batch}"]

    check = Part("check", 160, [str(HERE / "check.py")])
    encode = str(ROOT / "benchmarks/encode.py")
    if not on_gpu:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        small = ["model.preset=null", *(f"model.{key}={value}" for key, value in {**sizes, "embed_dim": 32}.items())]
        small += ["data.row_length=64", "data.workers=1"]
        return [
            check,
            train("small", 300, "quickstart", 8, *small),
            Part("encode", 160, [encode, "--sentences", "20", "--repeats", "1"]),
        ]
    tests = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/model", "tests/encoders"]
    profiled = "train.profile_steps=[5,5]"
    return [
        check,
        Part("tests", 60, tests),
        train("1.6b, 8 rows", 150, "1.6b", 16, *batch(8, 8), profiled),
        train("1.6b, 8 rows, fp8", 90, "1.6b_fp8", 12, *batch(8, 8)),
        train("1.6b, 4 x 8 rows", 80, "1.6b", 12, *batch(32, 8)),
        Part("encode", 120, [encode, "--encoder", "sonar-random", "--repeats", "1"]),
        train("1.6b, 2 x 16 rows", 90, "1.6b", 12, *batch(32, 16)),
        train("1.6b, 32 rows", 90, "1.6b", 12, *batch(32, 32)),
        train("150m, 8 rows", 60, "150m", 32, *batch(8, 8)),
        train("1.6b, 8 rows, not compiled", 60, "1.6b", 12, *batch(8, 8), "train.compile=false"),
        Part("doctor", 60, ["-m", "lcm_ds.doctor.kernels"]),
    ]


def main() -> int:
    """Run the parts one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=530, help="of all parts together")
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), help="folder of the parts' complete output")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    started, failed = time.monotonic(), 0
    print(machine())
    for part in parts(torch.cuda.is_available()):
        left = arguments.seconds - (time.monotonic() - started)
        if left < LEAST:
            print(f"\n{part.name}: left out, {max(0, left):.0f} s are left", flush=True)
            continue
        log = arguments.out / f"{part.name.replace(',', '').replace(' ', '_')}.log"
        failed += not run(part, min(part.seconds, left), log)
    print(f"\n{time.monotonic() - started:.0f} s; complete output in {arguments.out}")
    return 1 if failed else 0


def run(part: Part, seconds: float, log: Path) -> bool:
    """Run a part, and print the end of what it printed, without warnings; returns whether it succeeded.

    Args:
        part: The part.
        seconds: After which it is ended.
        log: File for its output; warnings and errors go into a file of the same name with .err.
    """
    started = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as out, log.with_suffix(".err").open("w") as err:
        command = [sys.executable, *part.command]
        child = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err, env=environment)
        ended = "exit code"
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            ended = "took too long, exit code"
            child.terminate()  # train.py ends its run
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)
            child.kill()
            child.wait()
    succeeded = child.returncode == 0
    result = "done" if succeeded else f"{ended} {child.returncode}"
    print(f"\n## {part.name}: {result}, {time.monotonic() - started:.0f} s\n")
    lines = log.read_text(errors="replace").strip().splitlines()
    if not succeeded:
        lines += log.with_suffix(".err").read_text(errors="replace").strip().splitlines()[-3:]
    print("\n".join(lines[-LINES:]), flush=True)
    return succeeded


def machine() -> str:
    """Device and versions."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})"
    memory = f", {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB" if cuda else ""
    versions = f"torch {torch.__version__}, DeepSpeed {deepspeed.__version__}, transformers {transformers.__version__}"
    return f"{device}{memory}, {len(os.sched_getaffinity(0))} cores; {versions}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
