"""`lcm-ds prepare --dry-run`: sentences, hours, disk and shards of a preparation, also without its source.

Every line names what it stands on. FineWeb-Edu's sample of 10 billion tokens says how long documents and sentences are.
"""

from __future__ import annotations

import glob
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lcm_ds.config import PrepareConfig, load
from lcm_ds.errors import InputError
from lcm_ds.prepare.disk_space import CHARACTERS_PER_DOCUMENT, CHARACTERS_PER_SENTENCE, dataset_bytes
from lcm_ds.terminal import figure, in_bytes

SONAR_DIMS, MINILM_DIMS = 1024, 384


@dataclass(frozen=True)
class Given:
    """What a plan takes as given; None: to be found, or not known."""

    documents: int | None = None  # of the source
    sentences: int | None = None
    embed_dim: int | None = None
    rate: float | None = None  # sentences per second of a process, or GPU
    measure: float | None = None  # seconds to measure it on this machine
    price_per_gpu_hour: float | None = None

    def errors(self) -> Iterator[str]:
        """What is wrong with them, one line each."""
        if self.rate is not None and self.measure is not None:
            yield "--rate, --measure: give only one of them"
        if self.price_per_gpu_hour is not None and self.price_per_gpu_hour <= 0:
            yield f"--price-per-gpu-hour {self.price_per_gpu_hour:g}: has to be more than 0"


@dataclass(frozen=True)
class Amount:
    """How much there is to encode."""

    documents: float
    sentences: float
    origin: str  # of these numbers, for display


def dry_run(path: str | Path, overrides: Sequence[str], ranks: int | None, given: Given) -> None:
    """Print what a preparation takes; arguments and errors of `plan_lines`."""
    for line in plan_lines(path, overrides, ranks, given):
        print(line, flush=True)


def plan_lines(path: str | Path, overrides: Sequence[str], ranks: int | None, given: Given) -> Iterator[str]:
    """Everything that is known about a preparation, one line each.

    Args:
        path: A prepare config.
        overrides: key=value.
        ranks: Number of processes that encode, or GPUs; None: `processes` of the config, or 1.
        given: What is taken as given.

    Raises:
        InputError: An invalid config or option; nothing to measure with.
    """
    config = load(PrepareConfig, path, overrides)
    errors = [*given.errors()]
    if config.encoder is None:
        errors.append(f"{path}: source: concepts that exist are not encoded; leave --dry-run out")
    if errors:
        raise InputError(errors)
    assert config.encoder is not None
    ranks = ranks or config.processes or 1
    amount: Amount | None = None
    try:
        amount = amount_of(config, given)
    except InputError as error:
        if _is_here(config):
            raise
        yield f"source        not there yet: {error.errors[0]}"
    yield f"encoder       {config.encoder.name}, {config.encoder.model}: {ranks} process(es), or GPU(s)"
    if amount is None:
        yield "sentences     not known: --documents N or --sentences N gives the size of the source"
    else:
        unfiltered = ", before source.filter" if config.source.filter else ""
        yield f"documents     {amount.documents:,.0f}, {amount.sentences:,.0f} sentences ({amount.origin}{unfiltered})"
    rate, origin, embed_dim = given.rate, "--rate", given.embed_dim or _known_dims(config)
    if given.measure is not None:
        from lcm_ds.prepare.measure import measure

        measured = measure(config, given.measure)
        rate, origin, embed_dim = measured.rate, measured.described, measured.embed_dim
    yield from _hours(amount, rate, origin, ranks, given.price_per_gpu_hour)
    yield from _disk(config, amount, embed_dim)


def _is_here(config: PrepareConfig) -> bool:
    """Whether the source's files are on this machine, so that what is wrong with them is a mistake."""
    places = config.source.paths or [config.source.dataset or ""]
    return all(glob.glob(place, recursive=True) for place in places)


def amount_of(config: PrepareConfig, given: Given) -> Amount | None:
    """The documents and sentences to encode: those given, or of the source; None if it does not know them.

    Args:
        config: Of the preparation.
        given: What is taken as given.

    Raises:
        InputError: The source is not there, or the hub cannot be reached.
    """
    per_document = CHARACTERS_PER_DOCUMENT / CHARACTERS_PER_SENTENCE
    take, chars = config.source.take, CHARACTERS_PER_SENTENCE
    if given.documents is not None:
        documents = min(given.documents, take or given.documents)
        if given.sentences is not None:
            return Amount(documents, given.sentences * documents / given.documents, "--documents, --sentences")
        return Amount(
            documents, documents * per_document, f"--documents, {per_document:.0f} sentences each as in FineWeb-Edu"
        )
    if given.sentences is not None:
        return Amount(
            given.sentences / per_document,
            given.sentences,
            f"--sentences, {per_document:.0f} to a document as in FineWeb-Edu",
        )
    from lcm_ds.text.open import open_source

    source = open_source(config.source, config.sentences.language)
    if source.total is None or source.characters is None:
        return None
    return Amount(
        source.total, source.characters / chars, f"the source's {source.characters:,} characters, {chars} to a sentence"
    )


def _known_dims(config: PrepareConfig) -> int | None:
    """Numbers in a concept, if they are known without loading the model."""
    assert config.encoder is not None
    if config.encoder.name == "sonar":
        return SONAR_DIMS
    return MINILM_DIMS if config.encoder.model == "minilm" else None


def _hours(amount: Amount | None, rate: float | None, origin: str, ranks: int, price: float | None) -> Iterator[str]:
    if rate is None:
        yield "hours         not known: --rate R (sentences per second and GPU), or --measure 30s on this machine"
        return
    yield f"rate          {figure(rate)} sentences/s per process, or GPU ({origin})"
    if amount is None:
        return
    hours = amount.sentences / rate / 3600
    yield (
        f"hours         {figure(hours / ranks)} on {ranks}; {figure(hours)} GPU-hours: sentences / rate, without the "
        "start, if reading and splitting keep up (split_workers)"
    )
    if price is not None:
        yield f"cost          {figure(hours * price)}: GPU-hours × {price:g} (--price-per-gpu-hour)"


def _disk(config: PrepareConfig, amount: Amount | None, embed_dim: int | None) -> Iterator[str]:
    if embed_dim is None:
        yield "disk          not known: --embed-dim D gives the size of a concept"
    elif amount is not None:
        yield (
            f"disk          {in_bytes(dataset_bytes(config, amount.sentences, embed_dim))}: {embed_dim} numbers in "
            f"{config.dtype} (dtype) and {CHARACTERS_PER_SENTENCE} characters per sentence"
        )
    folder = next(each for each in [Path(config.output), *Path(config.output).resolve().parents] if each.is_dir())
    yield f"free          {in_bytes(shutil.disk_usage(folder).free)} in {folder}"
    if amount is not None:
        units = -(-round(amount.documents) // config.documents_per_shard)
        yield (
            f"shards        {units:,} for training, as many or fewer for validation: {config.documents_per_shard:,} "
            "documents each (documents_per_shard)"
        )
