"""`lcm-ds inspect`: what a dataset holds, and whether it is still what was written."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import safe_open

from lcm_ds.config import DataConfig
from lcm_ds.data.format import DATASET, NORMALIZER, SPLITS, Dataset, open_dataset, read_normalizer
from lcm_ds.data.remote import fetch as remote
from lcm_ds.data.remote.cache import Cache
from lcm_ds.data.shard import open_shard_once
from lcm_ds.data.shard import verify as read_again
from lcm_ds.errors import Collector, InputError
from lcm_ds.terminal import strip_control_chars

# Read for the lengths of sentences; the second if shards have to be fetched.
SAMPLED_SHARDS, FETCHED_SHARDS = 50, 5
BAR = 28  # characters of the longest bar of a histogram
T = TypeVar("T")


def inspect(path: str | Path, verify: bool = False, sample: int = 0) -> None:
    """Print totals, lengths, encoder, splitter and refusals of a dataset, or of both splits in the folder of prepare.

    Args:
        path: A folder or a URL.
        verify: Whether to read every shard first and compare its checksum.
        sample: How many documents to print, always the same.

    Raises:
        InputError: With every error.
    """
    if sample < 0:
        raise InputError(f"--sample: {sample} is below 0; it is how many documents to print")

    def look(dataset: Dataset) -> None:
        if verify:
            count = len(dataset.shards)
            print(f"{dataset.path}: {count} shards verified: every checksum and every document is as written")
        _print_table(dataset)
        if sample:
            _print_documents(dataset, sample)

    look_at_each(path, verify, look)


def look_at_each(path: str | Path, verify: bool, look: Callable[[Dataset], T]) -> list[T]:
    """Open each dataset of a folder and look at it.

    Args:
        path: A folder or a URL.
        verify: Whether to read every shard first and compare its checksum.
        look: Called with each; what it reads of a remote dataset is gone afterwards.

    Returns:
        What `look` returned.

    Raises:
        InputError: With the errors of all datasets.
    """
    errors, seen = Collector(), []
    with tempfile.TemporaryDirectory(prefix="lcm-ds-") as cache:
        for folder in _datasets_in(str(path)):
            with errors:
                # Verifying reports missing shards itself.
                dataset = open_dataset(folder, Cache(cache), checksums=False, sizes=not verify)
                if verify:
                    _verify(dataset)
                seen.append(look(dataset))
    errors.raise_if_any()
    return seen


def summary(dataset: Dataset) -> dict[str, str]:
    """Totals, lengths, encoder, splitter and refusals of a dataset, as the lines of a table by name."""
    return dict(_rows(dataset))


def _datasets_in(path: str) -> list[str]:
    """The dataset itself, or the splits in an output folder of prepare."""
    if remote.read_bytes(remote.join(path, DATASET)) is not None:
        return [path]
    splits = [remote.join(path, split) for split in SPLITS]
    return [split for split in splits if remote.read_bytes(remote.join(split, DATASET)) is not None] or [path]


def _verify(dataset: Dataset) -> None:
    from rich.console import Console
    from rich.progress import track

    found = []
    shards = track(
        read_again(dataset), "verifying", len(dataset.shards), transient=True, disable=not Console().is_terminal
    )
    for errors in shards:
        found += errors
    if found:
        raise InputError(found)


def _print_documents(dataset: Dataset, count: int) -> None:
    """Documents drawn from all of the dataset's, the same ones each time."""
    ends = np.cumsum([shard.documents for shard in dataset.shards])
    total = int(ends[-1])
    for position in sorted(random.Random(0).sample(range(total), min(count, total))):
        index = int(np.searchsorted(ends, position, side="right"))
        shard = open_shard_once(dataset, index)
        document = position - int(ends[index] - dataset.shards[index].documents)
        meta = shard.meta(document)
        print()
        print(strip_control_chars(f"{meta['id']} ({meta['source']}; {shard.name}, {shard.keys[document]})"))
        for i, sentence in enumerate(meta["sentences"]):
            print(strip_control_chars(f"{i:6}  {sentence}"))
    print()


def _print_table(dataset: Dataset) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(dataset.path), show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in summary(dataset).items():
        table.add_row(name, value)
    Console().print(table, markup=False)


def _rows(dataset: Dataset) -> Iterator[tuple[str, str]]:
    """The lines of the table."""
    info, totals = dataset.info, dataset.info.totals
    yield "documents", f"{totals.documents:,}"
    yield "concepts", f"{totals.concepts:,} of {info.embed_dim} × {info.dtype}"
    yield "shards", f"{totals.shards:,}, {totals.bytes / 2**20:,.1f} MiB"
    most = FETCHED_SHARDS if remote.is_remote(dataset.path) else SAMPLED_SHARDS
    step = -(-len(dataset.shards) // most)
    lengths, characters = _lengths(dataset, range(0, len(dataset.shards), step))
    of = "" if step == 1 else f" (of {len(lengths):,} documents)"
    yield "sentences a document", _spread(lengths) + of
    if len(characters):
        yield "characters a sentence", _spread(characters) + of
    if info.supervised is not None:
        yield "supervised", _supervised(dataset, range(0, len(dataset.shards), step)) + of
    yield "encoder", _joined(info.encoder)
    yield "splitter", _joined(info.splitter) or "not known"
    if info.end_of_text is not None:
        yield "end of text", repr(info.end_of_text.text)
    source = dict(info.source)
    refused = source.pop("refused", {})
    yield "normaliser", _normalizer(dataset)
    yield "source", _joined(source) or "not known"
    yield "refused", _joined(refused) or "none"
    yield "fingerprint", dataset.fingerprint


def _normalizer(dataset: Dataset) -> str:
    """The normaliser's statistics, if its file is local and has them, and the ranges of its vectors."""
    center, scale = read_normalizer(dataset.path)
    statistics: dict[str, Any] = {}
    if not remote.is_remote(dataset.path):
        with safe_open(Path(dataset.path) / NORMALIZER, "np") as file:
            statistics = json.loads((file.metadata() or {}).get("statistics", "{}"))
    ranges = {
        "center": f"{center.min():.3g} to {center.max():.3g}",
        "scale": f"{scale.min():.3g} to {scale.max():.3g}",
    }
    return _joined(statistics | ranges)


def _lengths(dataset: Dataset, shards: range) -> tuple[np.ndarray, np.ndarray]:
    """Sentences of each document, and characters of each sentence, in these shards, but for the end-of-text."""
    lengths: list[int] = []
    characters: list[int] = []
    end = None if dataset.info.end_of_text is None else dataset.info.end_of_text.text
    for index in shards:
        shard = open_shard_once(dataset, index)
        for document, concepts in enumerate(shard.lengths.tolist()):
            sentences = shard.meta(document)["sentences"]
            ended = end is not None and (not sentences or sentences[-1] == end)
            lengths.append(concepts - ended)
            characters.extend(len(str(text)) for text in sentences[: len(sentences) - ended])
    return np.asarray(lengths), np.asarray(characters)


def _supervised(dataset: Dataset, shards: range) -> str:
    """Concepts of sources and targets in these shards, and documents that are longer than a segment is by default."""
    lengths, given = [], []
    for index in shards:
        shard = open_shard_once(dataset, index)
        lengths.append(shard.lengths)
        given.append(shard.given)
    total, sources, longest = (
        np.concatenate(lengths),
        np.concatenate(given),
        DataConfig.model_fields["max_segment"].default,
    )
    assert dataset.info.supervised is not None
    suffix = dataset.info.supervised.source_suffix
    return (
        f"{sources.sum():,} concepts are given, {(total - sources).sum():,} are learned; "
        f"{'no suffix' if suffix is None else f'sources end with {suffix!r}'}; {int((total > longest).sum()):,} "
        f"documents are longer than {longest}"
    )


def _spread(values: np.ndarray) -> str:
    """Percentiles in a line, and a histogram below it."""
    low, middle, high, highest = np.percentile(values, (5, 50, 95, 100))
    line = f"median {middle:.0f}, mean {values.mean():.1f}, 5–95 % {low:.0f}–{high:.0f}, longest {highest:.0f}"
    return "\n".join([line, *_histogram(values)])


def _histogram(values: np.ndarray) -> Iterator[str]:
    """Bars over ranges that double in width: lengths of texts are spread over several orders of magnitude."""
    edges = [0, 1]
    while edges[-1] <= values.max():
        edges.append(edges[-1] * 2)
    counts, _ = np.histogram(values, edges)
    width = len(f"{edges[-1]:,}")
    for first, after, count in zip(edges, edges[1:], counts.tolist(), strict=False):
        if count:
            bar = "█" * max(1, round(BAR * count / counts.max()))
            yield f"{first:>{width},}–{after - 1:<{width},} {bar} {count:,}"


def _joined(mapping: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_joined(value) if isinstance(value, dict) else value}" for key, value in mapping.items())
