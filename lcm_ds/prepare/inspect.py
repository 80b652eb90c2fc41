"""`lcm-ds inspect`: what a dataset holds, and whether it is still what was written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lcm_ds.data.format import DATASET, NORMALIZER, Dataset, open_dataset, read_normalizer
from lcm_ds.data.reader import open_shard
from lcm_ds.data.reader import verify as read_again
from lcm_ds.errors import Collector, InputError
from lcm_ds.prepare.pipeline import SPLITS

SAMPLED_SHARDS = 50  # for the lengths of sentences, which only the texts tell


def inspect(path: str | Path, verify: bool = False) -> None:
    """Print totals, lengths, encoder, splitter and refusals of a dataset, or of both splits in the folder of prepare.

    verify: read every shard again and compare it with its checksum. Raises InputError with all that is wrong.
    """
    mistakes = Collector()
    for folder in _datasets_in(Path(path)):
        with mistakes:
            dataset = open_dataset(folder, checksums=False)
            _print_table(dataset)
            if verify:
                _verify(dataset)
    mistakes.raise_if_any()


def _datasets_in(path: Path) -> list[Path]:
    """The dataset itself, or the splits in a folder that prepare has made."""
    splits = [path / split for split in SPLITS if (path / split / DATASET).exists()]
    return splits if splits and not (path / DATASET).exists() else [path]


def _verify(dataset: Dataset) -> None:
    wrong = read_again(dataset)
    if wrong:
        raise InputError(wrong)
    print(f"{dataset.path}: {len(dataset.shards)} shards verified: every checksum and every document is as written")


def _print_table(dataset: Dataset) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(dataset.path), show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _rows(dataset):
        table.add_row(name, value)
    Console().print(table)


def _rows(dataset: Dataset) -> Iterator[tuple[str, str]]:
    """What the table says, line by line."""
    info, totals = dataset.info, dataset.info.totals
    yield "documents", f"{totals.documents:,}"
    yield "concepts", f"{totals.concepts:,} of {info.embed_dim} × {info.dtype}"
    yield "shards", f"{totals.shards:,}, {totals.bytes / 2**20:,.1f} MiB"
    step = max(1, len(dataset.shards) // SAMPLED_SHARDS)
    lengths, characters = _lengths(dataset, range(0, len(dataset.shards), step))
    of = "" if step == 1 else f" (of {len(lengths):,} documents)"
    yield "concepts a document", _spread(lengths) + of
    if len(characters):
        yield "characters a sentence", _spread(characters) + of
    yield "encoder", _told(info.encoder)
    yield "splitter", _told(info.splitter) or "not known"
    if info.end_of_text is not None:
        yield "end of text", repr(info.end_of_text.text)
    source = dict(info.source)
    refused = source.pop("refused", {})
    yield "normaliser", _normalizer(dataset)
    yield "source", _told(source) or "not known"
    yield "refused", _told(refused) or "none"
    yield "fingerprint", dataset.fingerprint


def _normalizer(dataset: Dataset) -> str:
    """What the normaliser was fitted on, where its file says so, and the ranges of its two vectors."""
    from safetensors import safe_open

    center, scale = read_normalizer(dataset.path)
    with safe_open(Path(dataset.path) / NORMALIZER, "np") as file:
        statistics = json.loads((file.metadata() or {}).get("statistics", "{}"))
    ranges = {
        "center": f"{center.min():.3g} to {center.max():.3g}",
        "scale": f"{scale.min():.3g} to {scale.max():.3g}",
    }
    return _told(statistics | ranges)


def _lengths(dataset: Dataset, shards: range) -> tuple[np.ndarray, np.ndarray]:
    """Concepts of each document, and characters of each sentence but the end-of-text, in these shards."""
    lengths: list[int] = []
    characters: list[int] = []
    end = None if dataset.info.end_of_text is None else dataset.info.end_of_text.text
    for index in shards:
        shard = open_shard(dataset, index)
        lengths.extend(shard.lengths.tolist())
        for document in range(len(shard)):
            characters.extend(len(text) for text in shard.meta(document)["sentences"] if text != end)
    return np.asarray(lengths), np.asarray(characters)


def _spread(values: np.ndarray) -> str:
    low, middle, high, highest = np.percentile(values, (5, 50, 95, 100))
    return f"median {middle:.0f}, mean {values.mean():.1f}, 5–95 % {low:.0f}–{high:.0f}, longest {highest:.0f}"


def _told(mapping: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_told(value) if isinstance(value, dict) else value}" for key, value in mapping.items())
