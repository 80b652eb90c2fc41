"""Concepts per second of the loader, compared with webdataset and with plain reads of the same files.

python benchmarks/loader.py [--concepts 400000] [--embed-dim 1024] [--seconds 5] [--plan]

webdataset decodes in as many DataLoader workers as the loader has threads, and packs the same rows. All alternatives
read several epochs and open each shard again in each, since there are more shards than the loader keeps open; "in 16
shards" is the same data in few enough to keep open. "first epoch" compares the checksum of every shard, which is the
default in the first epoch; the others do not, as later epochs. --plan measures the order of 150,000 shards with 60 G
concepts instead, without data.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader

from lcm_ds.data.format import DatasetInfo, commit, finish, open_dataset, write_normalizer
from lcm_ds.data.loader import Loader
from lcm_ds.data.plan import Plan, Source
from lcm_ds.data.writer import Document, write_shard

ROWS, ROW_LENGTH, MICRO_BATCH_ROWS, MAX_SEGMENT = 16, 1024, 4, 128
REPEATS = 3
WORKERS = (0, 1, 2)


def main() -> None:
    """Make the shards, measure the alternatives in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=400_000)
    parser.add_argument("--embed-dim", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds of each measurement")
    parser.add_argument("--plan", action="store_true")
    arguments = parser.parse_args()
    if arguments.plan:
        plan_at_scale()
        return
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as few:
        write_dataset(Path(folder), arguments.concepts, arguments.embed_dim, documents_per_shard=100)
        write_dataset(Path(few), arguments.concepts, arguments.embed_dim, documents_per_shard=500)
        print(f"warm, {arguments.embed_dim} dimensions")
        table(folder, few, arguments.seconds, arguments.embed_dim)
        print("\ncold: the files leave the page cache before each measurement of one epoch")
        table(folder, None, None, arguments.embed_dim)


def table(folder: str, few: str | None, seconds: float | None, embed_dim: int) -> None:
    """Measure and print all alternatives for `seconds` each, or (None) one epoch of files that are not in memory."""
    ways: dict[str, Callable[[], Iterator[int]]] = {"reads of 1 MiB": lambda: read(folder, embed_dim)}
    for n in WORKERS:
        ways[f"webdataset .decode(), {n} workers"] = lambda n=n: decoded(folder, n)
    for n in WORKERS:
        ways[f"Loader, {n} threads"] = lambda n=n: loaded(folder, n, None if few else 1)
    for n in WORKERS:
        ways[f"Loader, {n} threads, first epoch"] = lambda n=n: loaded(folder, n, 1, checksums=True)
    if few:
        ways["Loader, 0 threads, in 16 shards"] = lambda: loaded(few, 0, None)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            if few is None:
                forget(folder)
            speeds[name].append(speed(way(), None if name.endswith("first epoch") else seconds))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    plain = medians["reads of 1 MiB"]
    print("| reader | concepts/s (median) | of plain reading | × webdataset |\n| --- | ---: | ---: | ---: |")
    for name, middle in medians.items():
        base = medians.get(f"webdataset .decode(), {name.partition(', ')[2].partition(' ')[0]} workers")
        ratio = f"{middle / base:.1f}" if base and name.startswith("Loader") else ""
        print(f"| {name} | {middle:,.0f} | {middle / plain:.0%} | {ratio} |")


def plan_at_scale() -> None:
    """FineWeb-Edu's size: 150,000 shards of about 400,000 concepts, 224 lanes."""
    concepts = np.random.default_rng(0).integers(300_000, 500_000, 150_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    plan = Plan([Source(concepts.tolist())], 0, 224, ROW_LENGTH)
    plan.pieces(0, 0)
    ready = time.perf_counter() - started
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    steps = np.random.default_rng(1).integers(0, int(concepts.sum()) // (224 * ROW_LENGTH), 200)
    times, shares = [], []
    for step in steps.tolist():
        started = time.perf_counter()
        pieces = [piece for lane in range(224) for piece in plan.pieces(step, lane)]
        times.append(time.perf_counter() - started)
        of_shard = Counter[int]()
        for piece in pieces:
            of_shard[piece.shard] += piece.stop - piece.start
        shares.append(max(of_shard.values()) / sum(of_shard.values()))
    print(f"150,000 shards, {concepts.sum() / 1e9:.1f} G concepts, 224 lanes: plan ready in {ready:.2f} s, "
          f"{memory:.0f} MiB; all rows of a step in {statistics.median(times) * 1e3:.2f} ms "
          f"(worst {max(times) * 1e3:.2f}); "
          f"most of a step that comes from one shard: {max(shares):.2%}")  # fmt: skip


def write_dataset(
    folder: Path, concepts: int, embed_dim: int, documents_per_shard: int, length: int | None = None
) -> None:
    """Shards of documents of 5 to 100 random concepts, or of `length` each."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    number = done = 0
    while done < concepts:
        documents = []
        for _ in range(documents_per_shard):
            n = length or int(random.integers(5, 101))
            values = random.standard_normal((n, embed_dim), np.float32) * 0.01
            documents.append(Document(f"{number:08d}", str(number), "random", ["A sentence."] * n, values))
            number, done = number + 1, done + n
        commit(folder, write_shard(folder, f"{number:08d}.tar", documents))
    write_normalizer(folder, np.zeros(embed_dim), np.ones(embed_dim), {})
    finish(folder, DatasetInfo(encoder={"name": "random"}, embed_dim=embed_dim, dtype="float16"))


def forget(folder: str) -> None:
    """Ask the kernel to drop the files from its page cache."""
    for path in Path(folder).glob("*.tar"):
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: str, embed_dim: int) -> Iterator[int]:
    """The number of fp16 concepts in each read, epoch after epoch."""
    buffer = bytearray(1 << 20)
    while True:
        for path in sorted(Path(folder).glob("*.tar")):
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    yield count // (2 * embed_dim)
        yield 0


def decoded(folder: str, workers: int) -> Iterator[int]:
    """Concepts of each micro-batch of webdataset's documents, packed to rows in worker processes."""
    shards = sorted(map(str, Path(folder).glob("*.tar")))
    while True:
        dataset = webdataset.WebDataset(shards, shardshuffle=False).decode().compose(packed)
        for batch in DataLoader(dataset, batch_size=None, num_workers=workers):
            yield batch.shape[0] * batch.shape[1]
        yield 0


def packed(samples: Iterable[dict[str, np.ndarray]]) -> Iterator[torch.Tensor]:
    """fp16 [micro_batch_rows, row_length, embed_dim], documents one after the other."""
    batch, filled = None, 0
    for sample in samples:
        concepts = sample["npy"]
        while len(concepts):
            if batch is None:
                batch = torch.empty(MICRO_BATCH_ROWS * ROW_LENGTH, concepts.shape[1], dtype=torch.float16)
            count = min(len(concepts), len(batch) - filled)
            batch.numpy()[filled : filled + count] = concepts[:count]
            concepts, filled = concepts[count:], filled + count
            if filled == len(batch):
                yield batch.view(MICRO_BATCH_ROWS, ROW_LENGTH, -1)
                batch, filled = None, 0


def loaded(folder: str, workers: int, epochs: int | None, checksums: bool = False) -> Iterator[int]:
    """Concepts of each micro-batch of the loader; 0 after the last epoch."""
    dataset = open_dataset(folder, checksums=checksums)
    if checksums:  # compared once per process: as if all files were new
        for path in Path(folder).glob("*.tar"):
            os.utime(path)
    plan = Plan([Source([shard.concepts for shard in dataset.shards])], 0, ROWS, ROW_LENGTH, epochs)
    loader = Loader([dataset], plan, MAX_SEGMENT, 0, 1, MICRO_BATCH_ROWS, workers)
    try:
        for batch in loader:
            yield batch.real_concepts
    finally:
        loader.close()
    yield 0


def speed(counts: Iterator[int], seconds: float | None) -> float:
    """Concepts per second over `seconds`, or over an epoch, which ends with a 0; including opening."""
    started = time.perf_counter()
    total = 0
    for count in counts:
        total += count
        if time.perf_counter() - started >= seconds if seconds is not None else count == 0:
            break
    elapsed = time.perf_counter() - started
    counts.close()  # type: ignore[attr-defined]
    return total / elapsed


if __name__ == "__main__":
    main()
