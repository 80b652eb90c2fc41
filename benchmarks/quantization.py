"""The cost of storing concepts in 8 bits: cosine and relative ℓ2 to float16, and bytes.

python benchmarks/quantization.py DATASET [--concepts 100000]
"""

from __future__ import annotations

import argparse

import numpy as np

from lcm_ds.data.format import open_dataset, read_normalizer
from lcm_ds.data.normalizer import Constants, draw
from lcm_ds.data.quantization import Quantization
from lcm_ds.data.shard import open_shard


def main() -> None:
    """Quantise a uniform sample of a float16 dataset's concepts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--concepts", type=int, default=100_000)
    arguments = parser.parse_args()
    dataset = open_dataset(arguments.dataset)
    numbers = {shard.name: number for number, shard in enumerate(dataset.shards)}
    everything = Constants()  # includes ends of text: they are stored, too
    concepts = draw(
        dataset.shards, lambda shard: open_shard(dataset, numbers[shard.name]), arguments.concepts, everything
    )
    quantization = Quantization.of(*read_normalizer(dataset.path))
    stored = quantization.encode(concepts)
    decoded, exact = quantization.decode(stored).astype(np.float64), concepts.astype(np.float64)
    norms = np.linalg.norm(exact, axis=1)
    cosine = (decoded * exact).sum(1) / norms / np.linalg.norm(decoded, axis=1)
    error = np.linalg.norm(decoded - exact, axis=1) / norms
    print(f"{len(concepts):,} concepts of {dataset.embed_dim}, {dataset.info.encoder.get('model')}\n")
    print("| | mean | worst 0.1 % | worst |\n| --- | ---: | ---: | ---: |")
    print(f"| cosine | {cosine.mean():.6f} | {np.quantile(cosine, 0.001):.6f} | {cosine.min():.6f} |")
    print(f"| relative ℓ2 | {error.mean():.4f} | {np.quantile(error, 0.999):.4f} | {error.max():.4f} |")
    cut = (np.abs(stored.astype(np.int16)) == 127).mean()
    print(f"\nbytes a concept: {concepts.nbytes // len(concepts)} → {stored.nbytes // len(stored)}")
    print(f"cut off at ±8 standard deviations: {cut:.2e} of the numbers")


if __name__ == "__main__":
    main()
