"""`lcm-ds fit-normalizer`: one normaliser for a mixture of datasets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from lcm_ds.config import WeightedPath
from lcm_ds.data.concepts import encoder_differences, same_space
from lcm_ds.data.format import Dataset, ShardInfo, open_dataset, write_normalizer, write_normalizer_file
from lcm_ds.data.normalizer import Constants, constant, draw, fit
from lcm_ds.data.remote.cache import Cache
from lcm_ds.data.remote.fetch import is_remote
from lcm_ds.data.shard import Shard, open_shard_once
from lcm_ds.errors import Collector, InputError


def fit_normalizer(mixture: Sequence[str], samples: int = 1_000_000, output: str | None = None) -> None:
    """Fit center and scale to a sample of several datasets, each with a share in proportion to its weight.

    Args:
        mixture: "DATASET" or "DATASET=WEIGHT" each, a folder or a URL.
        samples: Concepts of the sample.
        output: The file to write; None to write into each of the datasets.

    Raises:
        InputError: With every error: a folder without a finished dataset, a weight that is not a number above 0,
            different encoders, dimensions without spread.
    """
    if samples < 2:
        raise InputError(f"--samples: {samples} is below 2")
    with TemporaryDirectory(prefix="lcm-ds-") as cache:
        datasets, weights = _open(mixture, output, cache)
        shares = [weight / sum(weights) for weight in weights]
        constants = [Constants.of(dataset.info.end_of_text, dataset.info.supervised) for dataset in datasets]
        available = [
            each.others(dataset.info.totals.concepts, dataset.info.totals.documents)
            for each, dataset in zip(constants, datasets, strict=True)
        ]
        # The sample is as large as the scarcest dataset allows.
        size = min([samples, *(count / share for count, share in zip(available, shares, strict=True))])
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
                "left_out": constant_concepts.names,
                "fingerprint": dataset.fingerprint,
            }
            for dataset, weight, each, constant_concepts in zip(datasets, weights, drawn, constants, strict=True)
        ],
    }
    for dataset, share, each in zip(datasets, shares, drawn, strict=True):
        if difference := encoder_differences(datasets[0].info.encoder, dataset.info.encoder):
            print(f"{datasets[0].path} and {dataset.path}: one encoder, but {difference}")
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
        if not same_space(other.info.encoder, datasets[0].info.encoder) or other.embed_dim != datasets[0].embed_dim:
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
        value = float(weight)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise InputError(f"{text}: the weight behind = has to be a number above 0, not {weight!r}")
    return WeightedPath(path=path, weight=value)


def _opener(dataset: Dataset) -> Callable[[ShardInfo], Shard]:
    indices = {shard.name: index for index, shard in enumerate(dataset.shards)}
    return lambda shard: open_shard_once(dataset, indices[shard.name])
