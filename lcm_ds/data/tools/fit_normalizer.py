"""`lcm-ds fit-normalizer`: one normaliser for a mixture of datasets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from lcm_ds.config import WeightedPath
from lcm_ds.data.format import Dataset, ShardInfo, open_dataset, write_normalizer, write_normalizer_file
from lcm_ds.data.normalizer import Constants, constant, draw, fit
from lcm_ds.data.remote.cache import Cache
from lcm_ds.data.remote.fetch import is_remote
from lcm_ds.data.shard import Shard, open_shard_once
from lcm_ds.errors import Collector, InputError


def fit_normalizer(mixture: Sequence[str], samples: int = 1_000_000, output: str | None = None) -> None:
    """Fit center and scale to a sample of several datasets, each with the share that its weight is of all weights.

    mixture: "DATASET" or "DATASET=WEIGHT" each, a folder or a URL. Written into every one of the folders, or to the
    file `output` alone. Raises InputError with every mistake: a folder that is no finished dataset, a weight that is no
    number above 0, datasets of different encoders, dimensions without spread.
    """
    if samples < 2:
        raise InputError(f"--samples: {samples} is below 2")
    with TemporaryDirectory(prefix="lcm-ds-") as cache:
        datasets, weights = _open(mixture, output, cache)
        shares = [weight / sum(weights) for weight in weights]
        constants = [Constants.of(dataset.info.end_of_text, dataset.info.supervised) for dataset in datasets]
        there = [
            each.others(dataset.info.totals.concepts, dataset.info.totals.documents)
            for each, dataset in zip(constants, datasets, strict=True)
        ]
        # No dataset has to give more than it has: the sample is as large as the scarcest one allows.
        size = min([samples, *(count / share for count, share in zip(there, shares, strict=True))])
        drawn = [
            draw(dataset.shards, _opener(dataset), max(1, round(size * share)), each)
            for dataset, share, each in zip(datasets, shares, constants, strict=True)
        ]
    sample = np.concatenate([each.astype(np.float32) for each in drawn])
    center, scale = fit(sample)
    statistics = {
        "samples": len(sample),
        "percentiles": [25, 50, 75],
        "constant_dimensions": constant(sample).tolist(),
        "mixture": [
            {
                "path": dataset.path,
                "weight": weight,
                "samples": len(each),
                "left_out": alike.names,
                "fingerprint": dataset.fingerprint,
            }
            for dataset, weight, each, alike in zip(datasets, weights, drawn, constants, strict=True)
        ],
    }
    for dataset, share, each in zip(datasets, shares, drawn, strict=True):
        print(f"{dataset.path}: {len(each):,} of {dataset.info.totals.concepts:,} concepts, {share:.1%} of the sample")
    if output is not None:
        write_normalizer_file(Path(output), center, scale, statistics)
        print(f"{output}: written")
        return
    for dataset in datasets:
        write_normalizer(dataset.path, center, scale, statistics)
        print(f"{dataset.path}: normaliser written")


def _open(mixture: Sequence[str], output: str | None, cache: str) -> tuple[list[Dataset], list[float]]:
    """The datasets and their weights. Raises InputError with every mistake."""
    errors = Collector()
    weights: list[float] = []
    datasets: list[Dataset] = []
    for text in mixture:
        with errors:
            named = _weighted(text)
            if output is None and is_remote(named.path):
                raise InputError(f"{named.path}: is not on this machine: write the normaliser with --output")
            datasets.append(open_dataset(named.path, Cache(cache), checksums=False))
            weights.append(named.weight)
    for other in datasets[1:]:
        if other.info.encoder != datasets[0].info.encoder or other.embed_dim != datasets[0].embed_dim:
            errors.errors.append(
                f"{other.path}: its encoder is {other.info.encoder}, that of {datasets[0].path} "
                f"{datasets[0].info.encoder}: a mixture has one"
            )
    if output is not None and not Path(output).absolute().parent.is_dir():
        errors.errors.append(f"--output {output}: there is no such folder")
    errors.raise_if_any()
    return datasets, weights


def _weighted(text: str) -> WeightedPath:
    """DATASET or DATASET=WEIGHT."""
    path, separator, weight = text.rpartition("=")
    if not separator:
        return WeightedPath(path=text, weight=1.0)
    try:
        number = float(weight)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise InputError(f"{text}: the weight behind = has to be a number above 0, not {weight!r}")
    return WeightedPath(path=path, weight=number)


def _opener(dataset: Dataset) -> Callable[[ShardInfo], Shard]:
    numbers = {shard.name: number for number, shard in enumerate(dataset.shards)}
    return lambda shard: open_shard_once(dataset, numbers[shard.name])
