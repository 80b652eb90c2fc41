"""Concepts a second that the loader delivers, beside webdataset's own decoding of the same shards.

python benchmarks/loader.py [--concepts 200000] [--embed-dim 1024] [--seconds 5]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import webdataset

from lcm_ds.data.format import DatasetInfo, commit, finish, open_dataset, write_normalizer
from lcm_ds.data.loader import Loader
from lcm_ds.data.plan import Plan, Source
from lcm_ds.data.writer import Document, write_shard

ROWS, ROW_LENGTH, MICRO_BATCH_ROWS, MAX_SEGMENT = 16, 1024, 4, 128
REPEATS = 3


def main() -> None:
    """Make the shards, measure each way of reading them in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", type=int, default=200_000)
    parser.add_argument("--embed-dim", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), arguments.concepts, arguments.embed_dim)
        ways: dict[str, Callable[[], Iterator[int]]] = {"webdataset .decode()": lambda: decoded(Path(folder))}
        for workers in (0, 1, 2):
            ways[f"Loader, {workers} threads"] = lambda workers=workers: loaded(folder, workers, False)
        ways["Loader, 1 thread, checksums in the first epoch"] = lambda: loaded(folder, 1, True)
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(REPEATS):
            for name, way in ways.items():
                speeds[name].append(speed(way(), arguments.seconds))
    base = statistics.median(speeds["webdataset .decode()"])
    print("| reader | concepts/s (median) | ratio |\n| --- | ---: | ---: |")
    for name, values in speeds.items():
        middle = statistics.median(values)
        print(f"| {name} | {middle:,.0f} | {middle / base:.1f} |")


def write_dataset(folder: Path, concepts: int, embed_dim: int) -> None:
    """Shards of 500 documents of 5 to 100 random concepts."""
    random = np.random.default_rng(0)
    number = done = 0
    while done < concepts:
        documents = []
        for _ in range(500):
            n = int(random.integers(5, 101))
            values = random.standard_normal((n, embed_dim), np.float32) * 0.01
            documents.append(Document(f"{number:08d}", str(number), "random", ["A sentence."] * n, values))
            number, done = number + 1, done + n
        commit(folder, write_shard(folder, f"{number:08d}.tar", documents))
    write_normalizer(folder, np.zeros(embed_dim), np.ones(embed_dim), {})
    finish(folder, DatasetInfo(encoder={"name": "random"}, embed_dim=embed_dim, dtype="float16"))


def decoded(folder: Path) -> Iterator[int]:
    """Concepts of each document, as webdataset gives them."""
    shards = sorted(map(str, folder.glob("*.tar")))
    while True:
        for sample in webdataset.WebDataset(shards, shardshuffle=False).decode():
            yield len(sample["npy"])


def loaded(folder: str, workers: int, checksums: bool) -> Iterator[int]:
    """Concepts of each micro-batch of the loader."""
    dataset = open_dataset(folder, checksums=checksums)
    plan = Plan([Source([shard.concepts for shard in dataset.shards])], 0, ROWS, ROW_LENGTH)
    loader = Loader([dataset], plan, MAX_SEGMENT, 0, 1, MICRO_BATCH_ROWS, workers)
    try:
        for batch in loader:
            yield batch.concepts.shape[0] * batch.concepts.shape[1]
    finally:
        loader.close()


def speed(counts: Iterator[int], seconds: float) -> float:
    """Concepts a second over `seconds`, the opening included."""
    started = time.perf_counter()
    total = 0
    for count in counts:
        total += count
        if time.perf_counter() - started >= seconds:
            break
    elapsed = time.perf_counter() - started
    counts.close()  # type: ignore[attr-defined]
    return total / elapsed


if __name__ == "__main__":
    main()
