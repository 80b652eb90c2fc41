"""A preparation by its own processes, on Ray and under datatrove: sentences per second; the shards have to be the same.

python benchmarks/engines.py [--config CONFIG] [--processes 2] [--repeats 3] [key=value …]

Each is the complete call in processes of its own, with its start and the finishing of the dataset: `lcm-ds prepare`,
`lcm-ds prepare --on ray` with a cluster that it starts on this host, and datatrove's LocalPipelineExecutor with
EncodeConcepts in as many tasks as processes, then FinishDataset. They take turns. It fails if checksums differ.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lcm_ds.config import PrepareConfig, dump, load
from lcm_ds.data.format import read_shards
from lcm_ds.prepare.state import read_units

PREPARE = [sys.executable, "-m", "lcm_ds.cli", "prepare"]
DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from lcm_ds.integrations.datatrove import EncodeConcepts, FinishDataset
if __name__ == "__main__":
    config, processes, logs = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    encode = LocalPipelineExecutor([EncodeConcepts(config)], tasks=processes, logging_dir=logs + "/encode")
    LocalPipelineExecutor([FinishDataset(config)], depends=encode, logging_dir=logs + "/finish").run()
"""


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/prepare/quickstart.yaml")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments, more = parser.parse_known_args()
    overrides = [*arguments.overrides, *more, f"processes={arguments.processes}"]
    config = load(PrepareConfig, arguments.config, overrides)
    seconds: dict[str, list[float]] = {}
    sentences, checksums = 0, set()
    for _ in range(arguments.repeats):
        for name in ("lcm-ds prepare", "lcm-ds prepare --on ray", "datatrove, local executor"):
            with tempfile.TemporaryDirectory() as folder:
                seconds.setdefault(name, []).append(prepared(name, config, Path(folder)))
                out = Path(folder) / "out"
                sentences = sum(unit.sentences for unit in read_units(out))
                checksums.add(shards_of(out))
    print(f"{sentences:,} sentences, {arguments.processes} processes\n")
    print("| way | sentences/s (median) | from – to | seconds (median) | ratio |\n| --- | ---: | ---: | ---: | ---: |")
    base = statistics.median(seconds["lcm-ds prepare"])
    for name, found in seconds.items():
        middle, slowest, fastest = statistics.median(found), max(found), min(found)
        print(f"| {name} | {sentences / middle:,.0f} | {sentences / slowest:,.0f} – {sentences / fastest:,.0f} "
              f"| {middle:.1f} | {base / middle:.2f} |")  # fmt: skip
    if len(checksums) > 1:
        raise SystemExit("the shards differ")
    print("\nall shards have the same checksums")


def prepared(name: str, config: PrepareConfig, folder: Path) -> float:
    """Prepare into FOLDER/out and return the seconds that it took.

    Args:
        name: The way.
        config: What is prepared.
        folder: An empty one.
    """
    path = folder / "config.yaml"
    path.write_text(dump(config.model_copy(update={"output": str(folder / "out")})), encoding="utf-8")
    command = [*PREPARE, str(path)]
    if name.endswith("ray"):
        command += ["--on", "ray"]
    elif name.startswith("datatrove"):
        script = folder / "script.py"
        script.write_text(DATATROVE, encoding="utf-8")
        command = [sys.executable, str(script), str(path), str(config.processes), str(folder)]
    environment = {**os.environ, "RAY_ADDRESS": "local"}  # not a cluster that happens to run here
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}: {done.stdout}")
    return time.perf_counter() - started


def shards_of(out: Path) -> str:
    """The names and checksums of all shards."""
    splits = sorted(path.parent for path in out.glob("*/shards.jsonl"))
    return json.dumps(
        sorted((split.name, shard.name, shard.sha256) for split in splits for shard in read_shards(split))
    )


if __name__ == "__main__":
    main()
