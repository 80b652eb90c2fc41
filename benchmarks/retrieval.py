"""What evaluations take: counting the candidates nearer than the truth (R@k, MRR), and all of an evaluation.

python benchmarks/retrieval.py [--targets 2048] [--candidates 20480] [--repeats 3]
python benchmarks/retrieval.py --evaluation [--training 1000000] [--targets 50000] [--repeats 1]

Both ways of counting count the same; the seconds are those of the processor, on one thread. An evaluation measures a
small model with random weights beside all baselines, in a process of its own, on made datasets; memory is the largest
that is resident, without what is resident before it starts.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch

from lcm_ds.config import DataConfig
from lcm_ds.data.format import DatasetInfo, commit, finish, open_dataset, write_normalizer
from lcm_ds.data.writer import Document, write_shard
from lcm_ds.distributed.collectives import Ranks
from lcm_ds.evaluate.compute import measure
from lcm_ds.evaluate.target_sample import BLOCK, TargetSample, count_nearer
from lcm_ds.evaluate.task import EvaluationTask
from lcm_ds.evaluate.text_metrics import TextMetrics
from lcm_ds.metrics import compare
from lcm_ds.model.config import BaseLCMConfig
from lcm_ds.model.modeling import BaseLCM

LENGTH = 51  # concepts of a made document: 50 targets
DOCUMENTS = 100  # of a made shard
ROW_LENGTH = 128


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, help="default: 2,048; of an evaluation 50,000")
    parser.add_argument("--candidates", type=int, default=20_480)
    parser.add_argument("--embed-dim", type=int, default=384)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--evaluation", action="store_true", help="measure an evaluation")
    parser.add_argument("--training", type=int, default=1_000_000, help="concepts of its training data")
    parser.add_argument("--folder", help="for its datasets; default: a temporary one")
    parser.add_argument("--measure", nargs=2, metavar=("TRAIN", "VALIDATION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(*options.measure)))
    elif options.evaluation:
        evaluations(options)
    else:
        counting(options.targets or 2048, options.candidates, options.embed_dim, options.repeats or 3)


def counting(targets: int, candidates: int, embed_dim: int, repeats: int) -> None:
    """Measure both ways of counting and print the table.

    Args:
        targets: number of predictions.
        candidates: that they are compared with.
        embed_dim: of all vectors.
        repeats: turns.
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def concepts(count: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(count, embed_dim, generator=generator) + 0.5, dim=1)

    truth, others = concepts(targets), concepts(candidates)
    # A regression's predictions: near the mean, and a little towards the truth.
    predicted = 0.8 * others.mean(0) + 0.3 * (truth - others.mean(0))
    numbers = torch.arange(targets)
    sample = TargetSample(numbers, numbers, numbers, truth, {"model": predicted})

    def by_compare() -> torch.Tensor:
        parts = [slice(first, first + 2048) for first in range(0, targets, 2048)]
        counts = [
            sum((compare(predicted[part], truth[part], block) < 0).sum(1) for block in others.split(2048))
            for part in parts
        ]
        return torch.cat([torch.as_tensor(count) for count in counts])

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "fp64": by_compare,
        "count_nearer": lambda: count_nearer(sample, others.split(BLOCK), Ranks())["model"],
    }
    counts, seconds = {}, {}
    for name, way in ways.items():
        counts[name] = way()
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.process_time()
            way()
            seconds.setdefault(name, []).append(time.process_time() - started)
    assert torch.equal(counts["fp64"], counts["count_nearer"])
    pairs = targets * candidates
    print(f"{targets:,} targets, {candidates:,} candidates of {embed_dim} dimensions\n")
    print("| way | s a billion pairs | of fp64 |\n| --- | ---: | ---: |")
    for name, each in seconds.items():
        ratio = median(own / other for own, other in zip(each, seconds["fp64"], strict=True))
        print(f"| {name} | {median(each) / pairs * 1e9:.2f} | {ratio:.2f} |")


def evaluations(options: argparse.Namespace) -> None:
    """Measure an evaluation with a tenth of the training data and with all of it, and print the table."""
    targets = options.targets or 50_000
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make(folder / "validation", targets * LENGTH // (LENGTH - 1), options.embed_dim, 0)
        print(f"{targets:,} targets of {options.embed_dim} dimensions\n")
        print("| training concepts | processor s | wall s | memory, MiB |\n| ---: | ---: | ---: | ---: |")
        for concepts in (options.training // 10, options.training):
            train = folder / f"train-{concepts}"
            make(train, concepts, options.embed_dim, 1)
            found = [in_own_process(train, folder / "validation") for _ in range(options.repeats or 1)]
            middle = {key: median(each[key] for each in found) for key in found[0]}
            print(f"| {concepts:,} | {middle['processor']:.1f} | {middle['wall']:.1f} | {middle['memory']:.0f} |")


def make(folder: Path, concepts: int, embed_dim: int, seed: int) -> None:
    """Write a dataset.

    Args:
        folder: of the dataset.
        concepts: how many at least, in documents of LENGTH; each is close to the one before.
        embed_dim: of the concepts.
        seed: other seeds make other documents.
    """
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    documents = -(-concepts // LENGTH)
    for first in range(0, documents, DOCUMENTS):
        made = []
        for number in range(first, min(first + DOCUMENTS, documents)):
            noise = random.standard_normal((LENGTH, embed_dim), dtype=np.float32)
            for at in range(1, LENGTH):
                noise[at] += 0.5 * noise[at - 1]
            sentences = [f"Sentence {at}." for at in range(LENGTH)]
            made.append(Document(f"{number:09d}", f"document {number}", "made", sentences, noise))
        commit(folder, write_shard(folder, f"{first:09d}.tar", made, "float16"))
    write_normalizer(folder, np.zeros(embed_dim), np.ones(embed_dim), {})
    encoder = {"name": "synthetic", "model": f"made-{embed_dim}"}
    finish(folder, DatasetInfo(encoder=encoder, embed_dim=embed_dim, dtype="float16"))


def in_own_process(train: Path, validation: Path) -> dict[str, float]:
    """What an evaluation took: processor and wall seconds, and memory in MiB."""
    command = [sys.executable, __file__, "--measure", str(train), str(validation)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measured(train: str, validation: str) -> dict[str, float]:
    """As `in_own_process`, of this process."""
    data = DataConfig(train=train, row_length=ROW_LENGTH, max_segment=ROW_LENGTH)
    training, dataset = open_dataset(train), open_dataset(validation)
    torch.manual_seed(0)
    config = BaseLCMConfig(embed_dim=dataset.embed_dim, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                           num_attention_heads=2)  # fmt: skip
    task = EvaluationTask(data, data.train, [training], dataset, validation)
    model = BaseLCM(config).eval()
    before, processor, wall = resident(), time.process_time(), time.perf_counter()
    measure(model, task, Ranks(), TextMetrics(None, None, None, ()), 256)
    return {
        "processor": time.process_time() - processor,
        "wall": time.perf_counter() - wall,
        "memory": (resident() - before) / 2**20,
    }


def resident() -> int:
    """The largest resident memory of this process so far, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
