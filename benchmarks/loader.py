"""Concepts per second of the loader, compared with plain reads of the same files, webdataset and other readers.

python benchmarks/loader.py [--concepts 400000] [--embed-dim 1024] [--seconds 5] [--against FOLDER] [--plan]

Each way reads its epochs again and again, in turn with the others, in as many worker processes (the loader: threads) as
it says, and packs the same rows; of the ratios to plain reads, measured just before, the median is shown. The loader
compares every document with its checksum; "verify: size" does not. datasets reads concepts from Arrow files; litdata
is measured if it is installed. --against measures the loader of another checkout of this project as well, whose shards
it writes itself. --plan measures the order of 150,000 shards with 60 G concepts instead, without data.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
import webdataset
from torch.utils.data import DataLoader

from lcm_ds.data.format import DatasetInfo, commit, finish, open_dataset, write_normalizer
from lcm_ds.data.loader import Loader
from lcm_ds.data.plan import Plan, Source
from lcm_ds.data.writer import Document, write_shard

ROWS, ROW_LENGTH, MICRO_BATCH_ROWS, MAX_SEGMENT = 16, 1024, 4, 128
DOCUMENTS_PER_SHARD = 100
ROUNDS = 5
WORKERS = (0, 1, 2)


def main() -> None:
    """Make the files, measure the alternatives in turn, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=400_000)
    parser.add_argument("--embed-dim", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds of each measurement")
    parser.add_argument("--against", help="another checkout of this project")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # used by --against: "FOLDER WORKERS SECONDS FIRST"
    arguments = parser.parse_args()
    if arguments.measure:
        folder, workers, seconds, first = arguments.measure.split()
        once = not float(seconds)
        print(json.dumps(speed(loaded_before(folder, int(workers), first == "True", once), float(seconds) or None)))
        return
    if arguments.plan:
        plan_at_scale()
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_dataset(root / "tars", arguments.concepts, arguments.embed_dim, DOCUMENTS_PER_SHARD)
        arrow(root / "tars", root / "arrow")
        if importlib.util.find_spec("litdata"):
            write_litdata(root / "tars", root / "litdata")
        if arguments.against:  # its own shards.jsonl, which does not list an index
            code = "import sys; sys.path[:0] = ['benchmarks']; import loader; from pathlib import Path; "
            sizes = f"{arguments.concepts}, {arguments.embed_dim}, {DOCUMENTS_PER_SHARD}"
            code += f"loader.write_dataset(Path({str(root / 'before')!r}), {sizes})"
            subprocess.run([sys.executable, "-c", code], cwd=arguments.against, env=env(arguments.against), check=True)
        print(f"warm, {arguments.embed_dim} dimensions")
        table(root, arguments.seconds, arguments.embed_dim, arguments.against)
        print("\ncold: the files leave the page cache before each measurement of one epoch")
        table(root, None, arguments.embed_dim, arguments.against)


def table(root: Path, seconds: float | None, embed_dim: int, against: str | None) -> None:
    """Measure and print all alternatives for `seconds` each, or (None) one epoch of files that are not in memory."""
    ways: dict[str, Callable[[], float]] = {}

    def add(name: str, counts: Callable[[], Iterator[int]]) -> None:
        ways[name] = lambda: speed(counts(), seconds)

    tars = root / "tars"
    for n in WORKERS:
        add(f"Loader, {n}", lambda n=n: loaded(tars, n))
        add(f"Loader, verify: size, {n}", lambda n=n: loaded(tars, n, checksums=False))
        if against:
            for first in (True, False) if seconds else (True,):
                epoch = "first epoch" if first else "later epochs"
                ways[f"--against, {epoch}, {n}"] = lambda n=n, first=first: measured(against, root, n, seconds, first)
        add(f"webdataset .decode(), {n}", lambda n=n: decoded(tars, n))
        add(f"datasets, arrow, {n}", lambda n=n: from_arrow(root / "arrow", n))
        if (root / "litdata").exists():
            add(f"litdata, {n}", lambda n=n: from_litdata(root / "litdata", n))
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    plain: list[float] = []
    for _ in range(ROUNDS if seconds != 0.05 else 1):
        for name, way in ways.items():
            if seconds is None:
                forget(root)
            plain.append(speed(read(tars, embed_dim), seconds))
            if seconds is None:
                forget(root)
            speeds[name].append(way())
            ratios[name].append(speeds[name][-1] / plain[-1])
    print("| reader, workers | concepts/s (median) | of plain reads |\n| --- | ---: | ---: |")
    print(f"| reads of 1 MiB | {statistics.median(plain):,.0f} | 100% |")
    for name, found in speeds.items():
        print(f"| {name} | {statistics.median(found):,.0f} | {statistics.median(ratios[name]):.0%} |")


def plan_at_scale() -> None:
    """FineWeb-Edu's size: 150,000 shards of about 400,000 concepts, 2 G documents, 224 lanes."""
    documents = 2_000_000_000 // 150_000
    lengths = np.random.default_rng(0).integers(5, 55, documents).astype(np.uint32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    counts = [int(lengths.sum())] * 150_000
    plan = Plan([Source(counts, [documents] * 150_000, lambda shard: lengths, MAX_SEGMENT)], 0, 224, ROW_LENGTH)
    ready = time.perf_counter() - started
    last = sum(counts) // (224 * ROW_LENGTH)
    blocks, rows = [], []
    for step in np.random.default_rng(1).integers(0, last, 5).tolist():
        started = time.perf_counter()
        plan.lay_out(plan.blocks(step, range(224))[0])
        blocks.append(time.perf_counter() - started)
        for lanes in (range(224), range(8)):
            started = time.perf_counter()
            plan.segments(step, lanes)
            rows.append(time.perf_counter() - started)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"150,000 shards, {sum(counts) / 1e9:.1f} G concepts in 2 G documents, 224 lanes: ready in {ready:.2f} s; "
          f"a block laid out in {statistics.median(blocks):.2f} s; all rows of a step in "
          f"{statistics.median(rows[::2]) * 1e3:.2f} ms, 8 rows in {statistics.median(rows[1::2]) * 1e3:.2f} ms; "
          f"{memory:.0f} MiB")  # fmt: skip


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


def arrow(tars: Path, folder: Path) -> None:
    """The same concepts as a dataset of `datasets`: a document a row."""
    dataset = open_dataset(tars)
    documents = []
    for sample in webdataset.WebDataset(sorted(map(str, tars.glob("*.tar"))), shardshuffle=False).decode():
        values = pa.array(sample["npy"].reshape(-1).view(np.int16))
        concepts = pa.FixedSizeListArray.from_arrays(values, dataset.embed_dim)
        documents.append(pa.ListArray.from_arrays(pa.array([0, len(concepts)], pa.int32()), concepts))
    table = pa.table({"concepts": pa.chunked_array(documents)})
    datasets.Dataset(table).save_to_disk(folder)


def write_litdata(tars: Path, folder: Path) -> None:
    """The same concepts as chunks of litdata."""
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes=64 << 20)
    shards = webdataset.WebDataset(sorted(map(str, tars.glob("*.tar"))), shardshuffle=False).decode()
    for number, sample in enumerate(shards):
        writer[number] = {"npy": torch.from_numpy(sample["npy"])}
    writer.done()
    writer.merge()


def forget(root: Path) -> None:
    """Ask the kernel to drop the files from its page cache."""
    for path in root.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fdatasync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path, embed_dim: int) -> Iterator[int]:
    """The number of fp16 concepts in each read, epoch after epoch."""
    buffer = bytearray(1 << 20)
    while True:
        for path in sorted(folder.glob("*.tar")):
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    yield count // (2 * embed_dim)
        yield 0


def decoded(folder: Path, workers: int) -> Iterator[int]:
    """Concepts of each micro-batch of webdataset's documents, packed to rows in worker processes."""
    shards = sorted(map(str, folder.glob("*.tar")))
    dataset = webdataset.WebDataset(shards, shardshuffle=100).shuffle(1000).decode().compose(packed)
    yield from batches(lambda: DataLoader(dataset, batch_size=None, num_workers=workers))


def from_arrow(folder: Path, workers: int) -> Iterator[int]:
    """Concepts of each micro-batch of documents that `datasets` gives in random order."""
    stored = datasets.load_from_disk(folder).with_format("numpy")

    class Rows(torch.utils.data.IterableDataset[torch.Tensor]):
        def __iter__(self) -> Iterator[torch.Tensor]:
            mine = torch.utils.data.get_worker_info()
            first, step = (mine.id, mine.num_workers) if mine else (0, 1)
            order = np.random.default_rng(0).permutation(len(stored))[first::step]
            yield from packed({"npy": np.stack(stored[int(i)]["concepts"]).view(np.float16)} for i in order)

    yield from batches(lambda: DataLoader(Rows(), batch_size=None, num_workers=workers))


def from_litdata(folder: Path, workers: int) -> Iterator[int]:
    """Concepts of each micro-batch of litdata's shuffled documents."""
    from litdata import StreamingDataset

    class Rows(torch.utils.data.IterableDataset[torch.Tensor]):
        def __iter__(self) -> Iterator[torch.Tensor]:
            samples = StreamingDataset(str(folder), shuffle=True, drop_last=False)
            yield from packed({"npy": sample["npy"].numpy()} for sample in samples)

    yield from batches(lambda: DataLoader(Rows(), batch_size=None, num_workers=workers))


def batches(loader: Callable[[], Iterable[torch.Tensor]]) -> Iterator[int]:
    """Concepts of each batch, epoch after epoch; 0 at the end of each."""
    while True:
        for batch in loader():
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


def loaded(folder: Path, workers: int, checksums: bool = True) -> Iterator[int]:
    """Concepts of each micro-batch of the loader; 0 after each epoch."""
    from lcm_ds.data.supervised import source_of

    dataset = open_dataset(folder, checksums=checksums)
    plan = Plan([source_of(dataset, ROW_LENGTH, MAX_SEGMENT)], 0, ROWS, ROW_LENGTH)
    loader = Loader([dataset], plan, 0, 1, MICRO_BATCH_ROWS, workers)
    epochs = 0
    try:
        for batch in loader:
            if plan.epoch(batch.step) >= epochs + 1:
                epochs += 1
                yield 0
            yield batch.real_concepts
    finally:
        loader.close()


def loaded_before(folder: str, workers: int, first: bool, once: bool) -> Iterator[int]:
    """`loaded` of a checkout with order 1, which --against runs this function on."""
    dataset = open_dataset(folder, checksums=first)
    if first:  # compared once per process: as if all files were new
        for path in Path(folder).glob("*.tar"):
            os.utime(path)
    plan = Plan([Source([s.concepts for s in dataset.shards])], 0, ROWS, ROW_LENGTH, 1 if once else None)  # type: ignore
    loader = Loader([dataset], plan, MAX_SEGMENT, 0, 1, MICRO_BATCH_ROWS, workers)  # type: ignore
    try:
        for batch in loader:
            yield batch.real_concepts
        yield 0
    finally:
        loader.close()


def measured(against: str, root: Path, workers: int, seconds: float | None, first: bool) -> float:
    """The speed of another checkout's loader."""
    call = [
        sys.executable,
        __file__,
        "--measure",
        f"{root / 'before'} {workers} {0 if first else seconds or 0} {first}",
    ]
    done = subprocess.run(call, env=env(against), capture_output=True, text=True, check=True)
    return float(done.stdout)


def env(checkout: str) -> dict[str, str]:
    """An environment in which Python imports the project of a checkout."""
    return {**os.environ, "PYTHONPATH": checkout}


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
