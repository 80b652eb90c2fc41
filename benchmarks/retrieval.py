"""Counting the candidates that are nearer to a prediction than its truth: R@k and MRR of an evaluation.

python benchmarks/retrieval.py [--targets 2048] [--candidates 20480] [--repeats 3]

Both ways count the same; the seconds are those of the processor, on one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from lcm_ds.distributed.collectives import Ranks
from lcm_ds.evaluate.target_sample import BLOCK, TargetSample, count_nearer
from lcm_ds.metrics import compare


def main() -> None:
    """Measure both ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=2048)
    parser.add_argument("--candidates", type=int, default=20_480)
    parser.add_argument("--embed-dim", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def concepts(count: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(count, options.embed_dim, generator=generator) + 0.5, dim=1)

    truth, candidates = concepts(options.targets), concepts(options.candidates)
    # A regression's predictions: near the mean, and a little towards the truth.
    predicted = 0.8 * candidates.mean(0) + 0.3 * (truth - candidates.mean(0))
    numbers = torch.arange(options.targets)
    sample = TargetSample(numbers, numbers, numbers, truth, {"model": predicted})

    def by_compare() -> torch.Tensor:
        blocks = candidates.split(BLOCK)
        parts = [slice(first, first + BLOCK) for first in range(0, options.targets, BLOCK)]
        counts = [sum((compare(predicted[part], truth[part], block) < 0).sum(1) for block in blocks) for part in parts]
        return torch.cat([torch.as_tensor(count) for count in counts])

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "fp64": by_compare,
        "count_nearer": lambda: count_nearer(sample, candidates.split(BLOCK), Ranks())["model"],
    }
    counts, seconds = {}, {}
    for name, way in ways.items():
        counts[name] = way()
    for _ in range(options.repeats):
        for name, way in ways.items():
            started = time.process_time()
            way()
            seconds.setdefault(name, []).append(time.process_time() - started)
    assert torch.equal(counts["fp64"], counts["count_nearer"])
    pairs = options.targets * options.candidates
    print(f"{options.targets:,} targets, {options.candidates:,} candidates of {options.embed_dim} dimensions\n")
    print("| way | s a billion pairs | of fp64 |\n| --- | ---: | ---: |")
    for name, each in seconds.items():
        ratio = median(own / other for own, other in zip(each, seconds["fp64"], strict=True))
        print(f"| {name} | {median(each) / pairs * 1e9:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
