"""`lcm-ds adopt` and `lcm-ds export-data` compared with pyarrow alone on the same data, in turns; and their memory.

python benchmarks/adopt.py [--concepts 300000] [--embed-dim 1024] [--row-group 1000] [--repeats 3]

Read alone: pyarrow decodes every row of the file, and nothing is done with it. Adopted: it becomes shards in float16,
synced to the disk, in one process. Written alone: pyarrow writes the table, already in memory, as it does by default.
Exported: the shards become such a file. Memory is the most that a process of its own has resident, for a tenth of the
rows and for all of them. The sample that the normaliser is fitted to, which is of constant size, is small here.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lcm_ds.adopt.command import adoption_config
from lcm_ds.adopt.export import export_data
from lcm_ds.prepare.pipeline import prepare

SAMPLES = 2000  # of the normaliser
SETTINGS = [f"normalizer_samples={SAMPLES}", "validation=0"]


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=300_000)
    parser.add_argument("--embed-dim", type=int, default=1024)
    parser.add_argument("--row-group", type=int, default=1000, help="documents")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="for the files; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        paths = {}
        for share in (10, 1):
            paths[share] = folder / f"{share}.parquet"
            make(paths[share], arguments.concepts // share, arguments.embed_dim, arguments.row_group)
        megabytes = paths[1].stat().st_size / 1e6
        table = pq.read_table(paths[1])
        ways: dict[str, Callable[[], None]] = {
            "read by pyarrow alone": lambda: read(paths[1]),
            "adopted": lambda: adopt(paths[1], folder / "out"),
            "written by pyarrow alone": lambda: pq.write_table(table, folder / "alone.parquet"),
            "exported": lambda: export(folder / "out/train", folder / "exported.parquet"),
        }
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        processor: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(arguments.repeats):
            for way, run in ways.items():
                started, before = time.perf_counter(), time.process_time()
                run()
                speeds[way].append(megabytes / (time.perf_counter() - started))
                processor[way].append(time.process_time() - before)
        print(f"{arguments.concepts:,} concepts of {arguments.embed_dim} × float32 in row groups of "
              f"{arguments.row_group} documents, {megabytes:,.0f} MB\n")  # fmt: skip
        print("| way | MB/s, median | lowest to highest | of pyarrow's in the same turn | processor s |")
        print("| --- | ---: | ---: | ---: | ---: |")
        alone: list[float] = []
        for way, found in speeds.items():
            alone, share = (found, "") if "alone" in way else (alone, f"{ratio(found, alone):.2f}")
            print(f"| {way} | {statistics.median(found):,.0f} | {min(found):,.0f} to {max(found):,.0f} | {share} | "
                  f"{statistics.median(processor[way]):.1f} |")  # fmt: skip
        print("\n| memory, MiB | a tenth of the rows | all rows | ratio |\n| --- | ---: | ---: | ---: |")
        for way in ("adopted", "exported"):
            tenth, every = (peak(way, paths[share], folder / f"memory-{share}") for share in (10, 1))
            print(f"| {way} | {tenth / 2**20:,.0f} | {every / 2**20:,.0f} | {every / tenth:.2f} |")


def ratio(found: list[float], alone: list[float]) -> float:
    """The median of the ratios of two series, measured in turns."""
    return statistics.median(ours / theirs for ours, theirs in zip(found, alone, strict=True))


def make(path: Path, concepts: int, embed_dim: int, row_group: int) -> None:
    """Write a file in Meta's columns by pyarrow alone, of documents of 10 to 49 sentences."""
    random = np.random.default_rng(concepts)
    writer, written, documents = None, 0, 0
    while written < concepts:
        lengths = random.integers(10, 50, row_group)
        lengths = lengths[: np.searchsorted(np.cumsum(lengths), concepts - written) + 1]
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        numbers = random.standard_normal((int(ends[-1]), embed_dim), dtype=np.float32) * np.float32(0.01)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), embed_dim)
        sentences = pa.array([f"Sentence {number} of all that were written." for number in range(int(ends[-1]))])
        table = pa.table(
            {
                "id": [f"document-{documents + number}" for number in range(len(lengths))],
                "text_sentences": pa.ListArray.from_arrays(ends, sentences),
                "text_sentences_sonar_emb": pa.ListArray.from_arrays(ends, vectors),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table, row_group_size=row_group)
        written, documents = written + int(ends[-1]), documents + len(lengths)
    assert writer is not None
    writer.close()


def read(path: Path) -> None:
    """Decode every row by pyarrow, a few at a time, which is faster than all at once."""
    for _ in pq.ParquetFile(path).iter_batches(64):
        pass


def adopt(path: Path, output: Path) -> None:
    """Adopt a file in this process; a former output is removed first."""
    shutil.rmtree(output, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(adoption_config(str(path), str(output), processes=1, overrides=SETTINGS))


def export(dataset: Path, output: Path) -> None:
    """Export a dataset in this process; a former output is removed first."""
    output.unlink(missing_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        export_data(dataset, output)


def peak(way: str, path: Path, output: Path) -> int:
    """The largest resident memory of a process that adopts a file, or exports what was adopted, in bytes."""
    words = ["adopt", str(path), str(output), "--processes", "1", *SETTINGS]
    if way == "exported":
        words = ["export-data", str(output / "train"), str(output.with_suffix(".parquet"))]
    process = subprocess.Popen([sys.executable, "-m", "lcm_ds.cli", *words], stdout=subprocess.DEVNULL)
    status, kibibytes = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:  # not wait4: its ru_maxrss counts the process that started it, too
        if found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text()):
            kibibytes = int(found[1])
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"lcm-ds {words[0]} ended with {process.returncode}")
    return 1024 * kibibytes


if __name__ == "__main__":
    main()
