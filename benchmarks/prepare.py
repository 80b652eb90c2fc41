"""`lcm-ds prepare` from end to end, compared with plain encoding: sentences per second, encoder utilisation, memory.

python benchmarks/prepare.py [--parquet GLOB] [--config CONFIG] [--repeats 3] [key=value …]

Plain encoding is that of the published SONAR pipeline: fixed batches of 10 sentences in their order, fp32, one process.
Memory is the largest sum over all processes of a call, for a tenth of the documents and for all of them. The processor
time is that of the first process, its start included; others read and split.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

from lcm_ds.config import EncoderConfig, PrepareConfig, SentencesConfig, SourceConfig, load
from lcm_ds.encoders import load_encoder
from lcm_ds.text.open import open_source
from lcm_ds.text.splitter import Splitter

PLAIN_BATCH, PLAIN_SENTENCES = 10, 1000
TOLD = re.compile(
    r"encoded ([\d,]+) sentences in (\d+) s.* ([\d,]+) sentences/s; ([\d.]+)% .*padding ([\d.]+)% .*busy (\d+)%"
)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/prepare/quickstart.yaml")
    parser.add_argument(
        "--parquet", action="append", metavar="FILE", help="file or glob, instead of the config's source"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments, more = parser.parse_known_args()
    config = load(PrepareConfig, arguments.config, [*arguments.overrides, *more])
    if arguments.parquet:
        source = SourceConfig(name="huggingface", paths=arguments.parquet)
        config = config.model_copy(update={"source": source})
    plain, speeds, lines, peaks, processor = [], [], [], [], []
    for _ in range(arguments.repeats):
        plain.append(plain_speed(config))
        found, peak, seconds = prepared(config)
        speeds.append(float(found[2].replace(",", "")))
        lines.append(found)
        peaks.append(peak)
        processor.append(seconds)
    documents = open_source(config.source, config.sentences.language).total
    assert documents is not None
    tenth, total = prepared(config, max(1, documents // 10))[1], max(peaks)
    middle, base = lines[speeds.index(statistics.median_low(speeds))], statistics.median(plain)
    print("| way | sentences/s (median) | ratio |\n| --- | ---: | ---: |")
    print(f"| batches of {PLAIN_BATCH} in order, fp32, one process | {base:,.0f} | 1.0 |")
    print(f"| lcm-ds prepare, all of it | {statistics.median(speeds):,.0f} | {statistics.median(speeds) / base:.1f} |")
    print(f"\n{middle[0]} sentences in {middle[1]} s; encoder busy {middle[5]} %, padding {middle[4]} %, "
          f"repeats spared {middle[3]} %; processor time of the first process {statistics.median(processor):.1f} s "
          f"({min(processor):.1f} to {max(processor):.1f})")  # fmt: skip
    print(f"memory: {tenth / 2**20:,.0f} MiB for {documents // 10} documents, {total / 2**20:,.0f} MiB for "
          f"{documents}: {total / tenth:.2f} ×")  # fmt: skip


def plain_speed(config: PrepareConfig) -> float:
    """Sentences per second of plain encoding, on the first sentences of the source."""
    encoder = load_encoder(EncoderConfig(**{**config.encoder.model_dump(), "dtype": "float32", "backend": "torch"}))
    splitter = Splitter(SentencesConfig(**config.sentences.model_dump()))
    documents = open_source(config.source, config.sentences.language).documents()
    every = (sentence for document in documents for sentence in splitter.split(document.text))
    sentences = list(itertools.islice(every, PLAIN_SENTENCES))
    encoder.encode(sentences[:PLAIN_BATCH])
    started = time.perf_counter()
    for first in range(0, len(sentences), PLAIN_BATCH):
        encoder.encode(sentences[first : first + PLAIN_BATCH])
    return len(sentences) / (time.perf_counter() - started)


def prepared(config: PrepareConfig, take: int | None = None) -> tuple[tuple[str, ...], int, float]:
    """The figures that a call prints, the peak memory of its processes in bytes, and processor seconds of the first."""
    with tempfile.TemporaryDirectory() as folder:
        source = config.source.model_copy(update={"take": take} if take else {})
        changed = config.model_copy(update={"output": f"{folder}/out", "source": source, "normalizer_samples": 2000})
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(changed.model_dump(mode="json")), encoding="utf-8")
        command = [sys.executable, "-m", "lcm_ds.cli", "prepare", str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        peak, seconds = 0, 0.0
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            seconds = max(seconds, processor_seconds(process.pid))
            time.sleep(0.2)
        assert process.stdout is not None
        said = process.stdout.read()
        match = TOLD.search(said)
        if match is None:
            raise SystemExit(f"prepare ended with {process.returncode}: {said}")
        return match.groups(), peak, seconds


def memory_of(pid: int) -> int:
    """Proportional set size of a process and its descendants, in bytes."""
    total = 0
    try:
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            total += process.memory_full_info().pss
    except psutil.Error:
        return total
    return total


def processor_seconds(pid: int) -> float:
    """The processor time of a process, without its descendants; 0 once it has ended."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


if __name__ == "__main__":
    main()
