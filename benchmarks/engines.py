"""A preparation by its own processes, on Ray and under datatrove: sentences per second; the shards have to be the same.

python benchmarks/engines.py [--config CONFIG] [--processes 2] [--repeats 3] [key=value …]

Each is the complete call in processes of its own: `lcm-ds prepare`, `lcm-ds prepare --on ray` with a cluster that it
starts on this host, and datatrove's LocalPipelineExecutor with EncodeConcepts in as many tasks as processes, then
FinishDataset. They take turns. The first figure is that of the encoding, between the first unit that is made and the
last one; the second that of the whole call, with its start and its end. It fails if checksums differ.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from lcm_ds.config import PrepareConfig, dump, load
from lcm_ds.data.format import read_shards
from lcm_ds.prepare.state import REPORTS, UNITS, read_units

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
    found: dict[str, list[Measured]] = {}
    checksums = set()
    for _ in range(arguments.repeats):
        for name in ("lcm-ds prepare", "lcm-ds prepare --on ray", "datatrove, local executor"):
            with tempfile.TemporaryDirectory() as folder:
                found.setdefault(name, []).append(prepared(name, config, Path(folder)))
                checksums.add(shards_of(Path(folder) / "out"))
    print(f"{found['lcm-ds prepare'][0].sentences:,} sentences, {arguments.processes} processes\n")
    print("| way | encoding: sentences/s (median) | from – to | ratio | whole call: sentences/s (median) | from – to |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    base = statistics.median(each.encoding for each in found["lcm-ds prepare"])
    for name, measured in found.items():
        encoding, whole = (sorted(kind) for kind in zip(*((m.encoding, m.whole) for m in measured), strict=True))
        middle = statistics.median(encoding)
        print(f"| {name} | {middle:,.0f} | {encoding[0]:,.0f} – {encoding[-1]:,.0f} | {middle / base:.2f} | "
              f"{statistics.median(whole):,.0f} | {whole[0]:,.0f} – {whole[-1]:,.0f} |")  # fmt: skip
    if len(checksums) > 1:
        raise SystemExit("the shards differ")
    print("\nall shards have the same checksums")


class Measured(NamedTuple):
    """Of a call."""

    sentences: int
    encoding: float  # sentences per second from the first unit to the last one
    whole: float  # sentences per second of the call


def prepared(name: str, config: PrepareConfig, folder: Path) -> Measured:
    """Prepare into FOLDER/out.

    Args:
        name: The way.
        config: What is prepared.
        folder: An empty one.
    """
    path, out = folder / "config.yaml", folder / "out"
    path.write_text(dump(config.model_copy(update={"output": str(out)})), encoding="utf-8")
    command = [*PREPARE, str(path)]
    if name.endswith("ray"):
        command += ["--on", "ray"]
    elif name.startswith("datatrove"):
        script = folder / "script.py"
        script.write_text(DATATROVE, encoding="utf-8")
        command = [sys.executable, str(script), str(path), str(config.processes), str(folder)]
    # Not a cluster that happens to run here; and Ray's processes would yield to whatever else runs (a niceness of 15).
    environment = {**os.environ, "RAY_ADDRESS": "local", "RAY_worker_niceness": "0"}
    started = time.perf_counter()
    seen: dict[int, float] = {}  # when a unit was made
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            time.sleep(0.05)
            for unit in made(out) - seen.keys():
                seen[unit] = time.perf_counter()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{name} ended with {process.returncode}: {(folder / 'log.txt').read_text(encoding='utf-8')}")
    sizes = {unit.unit: unit.sentences for unit in read_units(out)}
    first, last = min(seen.values()), max(seen.values())
    after = sum(sizes[unit] for unit, at in seen.items() if at > first)
    if last == first:
        raise SystemExit("all units were made at once: needs more text, or a smaller documents_per_shard")
    return Measured(sum(sizes.values()), after / (last - first), sum(sizes.values()) / seconds)


def made(out: Path) -> set[int]:
    """The units that are committed or, by a task of datatrove, reported."""
    reported = {int(path.stem) for path in (out / REPORTS).glob("*[0-9].json")}
    lines = (out / UNITS).read_text(encoding="utf-8").splitlines() if (out / UNITS).exists() else []
    return reported | {int(match[1]) for line in lines if (match := re.match(r'{"unit": (\d+),', line))}


def shards_of(out: Path) -> str:
    """The names and checksums of all shards."""
    splits = sorted(path.parent for path in out.glob("*/shards.jsonl"))
    return json.dumps(
        sorted((split.name, shard.name, shard.sha256) for split in splits for shard in read_shards(split))
    )


if __name__ == "__main__":
    main()
