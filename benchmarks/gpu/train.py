"""Steps of `lcm-ds train` as users start it: a row with time, MFU, memory and waiting for data.

python benchmarks/gpu/train.py NAME CONFIG STEPS [key=value …]

The run trains on random concepts and is killed after STEPS steps, a multiple of 4, before it writes a checkpoint. With
train.profile_steps=[N,N] the longest kernels of that step follow the row.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EVERY = 4  # steps of a line of metrics.jsonl; in between the host does not wait for a step's results
WARM_UP = 1  # lines of steps that compile and allocate
LONGEST = 12  # kernels shown of a profiled step
HEADER = """\
| run | concepts/s | step (ms) | MFU | waiting for data | memory (GiB) | loss | start (s) |
| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |"""


class TrainingFailed(RuntimeError):
    """The run ended before it took the steps; with the end of its output."""


def main() -> int:
    """Measure a run; returns 1 if it failed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the run ends, too
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from loader import write_dataset

    from lcm_ds.config import TrainConfig, load
    from lcm_ds.model.config import resolve_model

    name, path, steps, *overrides = sys.argv[1:]
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        config = load(TrainConfig, path, overrides)
        concepts = config.batch.rows_per_step * config.data.row_length * 4  # epochs follow one another
        write_dataset(Path(folder, "data"), max(20_000, concepts), resolve_model(config.model).embed_dim, 100)
        started = time.perf_counter()
        try:
            lines = steps_of(path, Path(folder, "data"), Path(folder, "run"), int(steps) // EVERY, overrides, EVERY)
        except TrainingFailed as error:
            print(error, file=sys.stderr)
            print(f"| {name} | failed: {str(error).strip().splitlines()[-1]} | | | | | | |")
            return 1
        start = time.perf_counter() - started - sum(line["step_time"] for line in lines)
        print(f"| {name} | {row(lines)} | {start:.0f} |", flush=True)
        for kernel in profile_lines(Path(folder, "run")):
            print(kernel)
    return 0


def steps_of(
    config: str | Path, data: Path, run: Path, steps: int, overrides: list[str], every: int = 1
) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of a run's first steps; the run is then killed.

    Args:
        config: A train config.
        data: A dataset to train on.
        run: Folder of the run.
        steps: Number of lines to wait for.
        overrides: `key=value` of the config.
        every: Steps of a line.

    Raises:
        TrainingFailed: The run ended before.
    """
    places = [f"run_dir={run}", f"data.train={data}", "data.validation=null", f"log.every={every}"]
    endless = ["steps=100000", "epochs=null", "checkpoint.every=null", "checkpoint.every_minutes=null"]
    command = [sys.executable, "-m", "lcm_ds.train", str(config), *places, *endless, *overrides]
    metrics = run / "metrics.jsonl"
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        try:
            while len(found) < steps:
                ended = child.poll() is not None
                if metrics.exists():
                    complete = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
                    found = [line for line in map(json.loads, complete) if "step_time" in line]
                if ended and len(found) < steps:
                    output.seek(0)
                    raise TrainingFailed(output.read().decode(errors="replace")[-4000:] or f"exit {child.returncode}")
                time.sleep(0.2)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return found[:steps]


def row(lines: list[dict[str, Any]]) -> str:
    """Medians of the steps after warm-up, as cells of the table HEADER."""
    measured = lines[WARM_UP:] or lines
    keys = ("concepts_per_second", "step_time", "data_wait")
    rate, step, wait = (statistics.median(line[key] for line in measured) for key in keys)
    mfu = [line["mfu"] for line in measured if line.get("mfu") is not None]
    loss = f"{lines[0]['loss']:.4f} to {lines[-1]['loss']:.4f}"
    share = f"{statistics.median(mfu):.1%}" if mfu else "unknown"
    return f"{rate:,.0f} | {step * 1e3:.1f} | {share} | {wait / step:.1%} | {lines[-1]['memory']:.1f} | {loss}"


def profile_lines(run: Path) -> list[str]:
    """The longest kernels of a profiled step, and how busy the device was."""
    traces = list((run / "profile").glob("*.json"))
    if not traces:
        return []
    events = json.loads(traces[0].read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not kernels:
        return ["a profiled step: no kernels on a device"]
    seconds: Counter[str] = Counter()
    for event in kernels:
        seconds[event["name"][:70]] += event["dur"]
    launches = Counter(event["name"][:70] for event in kernels)
    span = max(event["ts"] + event["dur"] for event in kernels) - min(event["ts"] for event in kernels)
    busy = sum(seconds.values())
    head = f"a profiled step: {len(kernels)} launches, the device busy {busy / 1e3:.1f} of {span / 1e3:.1f} ms"
    longest = seconds.most_common(LONGEST)
    return ["", head, "", *(f"    {spent / 1e3:8.2f} ms {launches[name]:5} x {name}" for name, spent in longest)]


if __name__ == "__main__":
    sys.exit(main())
