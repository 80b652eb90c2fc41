"""The data of the experiment on books: nested training sets, the choosing and the validation set, and their variants.

A document's place in the order is a hash of its id, so that each training set is the beginning of the next one.
Variants of a set hold the same documents: `standard` has mean and standard deviation as its normaliser,
`characters-500` is split into longer sentences, `float32` is encoded and stored in float32, and from that
`float32-float16` and `float32-int8`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lcm_ds.data.format import (
    DATASET,
    NORMALIZER,
    SPLITS,
    Dataset,
    QuantParams,
    commit,
    finish,
    open_dataset,
    read_normalizer,
    write_normalizer,
)
from lcm_ds.data.normalizer import fit
from lcm_ds.data.quantization import Quantization
from lcm_ds.data.shard import Shard, open_shard
from lcm_ds.data.writer import Document, ShardWriter
from lcm_ds.errors import InputError
from lcm_ds.files import read_object, write_whole

CONFIG = Path(__file__).parents[1] / "configs/experiments/books/prepare.yaml"
ENCODINGS = "encodings.json"
CHOOSING, VALIDATION = "choosing", "validation"
SHARD_CONCEPTS = 20_000
SAME_CHARACTERS = 40  # shorter sentences ("Yes.") occur in many books
ENCODED_AGAIN = {"float32": "50k", "characters-500": "200k"}  # the largest training set that a variant is used with


class Entry(NamedTuple):
    """A document of an encoded corpus."""

    split: str
    shard: int
    document: int
    id: str
    group: str
    concepts: int

    @property
    def place(self) -> float:
        """In the order of its set: 0 to 1."""
        return share_of(self.id)


def share_of(key: str) -> float:
    """A hash, as a number from 0 to 1."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") / 2**64


class Corpus:
    """The encoded corpus and the sets that are cut from it, in an output folder."""

    def __init__(
        self, paths: Sequence[str], output: Path, sets: dict[str, int | None], held: dict[str, int], share: float
    ) -> None:
        """Name what is to be made; nothing is read.

        Args:
            paths: Parquet files and globs with text, id and file_path.
            output: The folder.
            sets: Concepts of each training set; None for all.
            held: Concepts of the choosing and of the validation set.
            share: Of the training books, those that are for choosing.
        """
        self.paths, self.output, self.sets, self.held, self.share = list(paths), output, sets, held, share
        self.encoded = output / "encoded"
        self._entries: dict[str, list[Entry]] | None = None

    def folder(self, variant: str, name: str) -> Path:
        """Where a set is, once it is made."""
        return self.output / "data" / variant / name

    def prepare(self) -> None:
        """Encode the corpus, unless that is done."""
        if not (self.encoded / "train" / DATASET).exists():
            self._prepare(self.encoded, self.paths)

    def make(self, variant: str, name: str) -> None:
        """Make a set, and the choosing and validation sets of its variant, unless they are there."""
        for each in dict.fromkeys((name, CHOOSING, VALIDATION)):
            if not (self.folder(variant, each) / DATASET).exists():
                self._make(variant, each)

    def _prepare(self, out: Path, paths: Sequence[str], *overrides: str) -> None:
        if not paths:
            raise InputError("--corpus: name the parquet files of the corpus")
        listed = "source.paths=" + json.dumps([os.path.abspath(path) for path in paths])
        command = [sys.executable, "-m", "lcm_ds.cli", "prepare", str(CONFIG), listed, f"output={out}", *overrides]
        print(f"{out}: preparing", flush=True)
        fresh, started = not out.exists(), time.monotonic()
        done = subprocess.run(command, stdout=sys.stderr)
        if done.returncode:
            raise InputError(f"{out}: the preparation has failed")
        infos = [open_dataset(path.parent).info for path in out.glob(f"*/{DATASET}")]
        taken = {
            "sentences": sum(info.totals.concepts - info.totals.documents for info in infos),
            "dtype": infos[0].encoder["dtype"],
            "seconds": time.monotonic() - started,
        }
        if fresh:
            write_whole(self.output / ENCODINGS, json.dumps(self.encodings() | {out.name: taken}, indent=1) + "\n")

    def encodings(self) -> dict[str, Any]:
        """Of each preparation that was not interrupted: sentences, dtype, and seconds of the call."""
        return read_object(self.output / ENCODINGS, default={})

    def _make(self, variant: str, name: str) -> None:
        shutil.rmtree(self.folder(variant, name), ignore_errors=True)
        if variant == "main":
            _write(self._datasets(self.encoded), self.chosen(name), self.folder(variant, name), self.encoded / "train")
        elif variant == "standard":
            self._with_standard_normaliser(name)
        elif variant in ("float32-float16", "float32-int8"):
            if not (self.folder("float32", name) / DATASET).exists():
                self._make("float32", name)
            source = open_dataset(self.folder("float32", name))
            entries = list(_entries(source, "train"))
            dtype = variant.removeprefix("float32-")
            steps = self._steps() if dtype == "int8" else None
            _write({"train": source}, entries, self.folder(variant, name), self.encoded / "train", dtype, steps)
        else:
            out = self.output / f"encoded-{variant}"
            if not (out / "train" / DATASET).exists():
                self._encode_again(variant, out)
            dataset = open_dataset(out / "train")
            by_id = {entry.id: entry for entry in _entries(dataset, "train")}
            kept = [by_id[entry.id] for entry in self.chosen(name) if entry.id in by_id]
            normalizer = self.encoded / "train" if variant == "float32" else out / "train"
            _write({"train": dataset}, kept, self.folder(variant, name), normalizer)

    def _encode_again(self, variant: str, out: Path) -> None:
        """Encode the documents of the sets that a variant is used with."""
        chosen = [entry for name in (ENCODED_AGAIN[variant], CHOOSING, VALIDATION) for entry in self.chosen(name)]
        table = self.output / f"{variant}.parquet"
        if variant == "float32":
            _sentences(self._datasets(self.encoded), chosen, table)
            changes = ["source.text_column=sentences", "encoder.dtype=float32", "dtype=float32"]
        else:
            _texts(self.paths, {entry.id for entry in chosen}, table)
            changes = ["sentences.max_characters=500"]
        self._prepare(out, [str(table)], *changes, "validation=0")

    def chosen(self, name: str) -> list[Entry]:
        """The documents of a set of the main variant, in order."""
        if self._entries is None:
            self._entries = {name: [] for name in (*SPLITS, CHOOSING)}
            for split, dataset in self._datasets(self.encoded).items():
                for entry in _entries(dataset, split):
                    choosing = split == "train" and share_of(f"choosing {entry.group}") < self.share
                    self._entries[CHOOSING if choosing else split].append(entry)
            for entries in self._entries.values():
                entries.sort(key=lambda entry: entry.place)
        entries = self._entries[name if name in (CHOOSING, VALIDATION) else "train"]
        most = self.held[name] if name in self.held else self.sets[name]
        if most is None:
            return entries
        total, kept = 0, []
        for entry in entries:
            if total >= most:
                break
            kept.append(entry)
            total += entry.concepts
        if not kept:
            raise InputError(f"{self.encoded}: has no document for the set {name}: too few books")
        return kept

    def _datasets(self, folder: Path) -> dict[str, Dataset]:
        return {split: open_dataset(folder / split) for split in SPLITS}

    def _with_standard_normaliser(self, name: str) -> None:
        """The main set with mean and standard deviation of the concepts of the 200k set as its normaliser."""
        for each in dict.fromkeys((name, "200k")):
            if not (self.folder("main", each) / DATASET).exists():
                self._make("main", each)
        concepts = np.concatenate([*_concepts(open_dataset(self.folder("main", "200k")))]).astype(np.float64)
        center, scale = (each.copy() for each in read_normalizer(self.folder("main", name)))
        mean, deviation = concepts.mean(0), concepts.std(0)
        spread = deviation > 1e-6 * np.median(deviation)  # others are constant, and stay as they are
        center[spread], scale[spread] = mean[spread], deviation[spread]
        source, out = self.folder("main", name), self.folder("standard", name)
        out.mkdir(parents=True)
        for path in sorted(source.iterdir()):
            if path.name != DATASET:
                os.link(path, out / path.name)
        (out / NORMALIZER).unlink()
        write_normalizer(out, center, scale, {"mean and standard deviation of": "200k"})
        shutil.copy(source / DATASET, out / DATASET)

    def _steps(self) -> Quantization:
        """Of int8, from the first concepts of the 50k set in float32."""
        if not (self.folder("float32", "50k") / DATASET).exists():
            self._make("float32", "50k")
        first = next(iter(_concepts(open_dataset(self.folder("float32", "50k")))))
        return Quantization.of(*fit(first[:4096]))

    def facts(self) -> dict[str, Any]:
        """Books, documents and concepts of each set, and the sentences that validation shares with training."""
        path = self.output / "facts.json"
        if path.exists():
            return dict(json.loads(path.read_text()))
        names = [*self.sets, CHOOSING, VALIDATION]
        chosen = {name: self.chosen(name) for name in names}
        sets = {
            name: {
                "books": len({entry.group for entry in entries}),
                "documents": len(entries),
                "concepts": sum(entry.concepts for entry in entries),
            }
            for name, entries in chosen.items()
        }
        datasets = self._datasets(self.encoded)
        training = {share_of(text) for text in _long_sentences(datasets, chosen[names[-3]])}
        shared = [share_of(text) in training for text in _long_sentences(datasets, chosen[VALIDATION])]
        facts = {
            "sets": sets,
            "shared_sentences": sum(shared) / max(1, len(shared)),
            "fingerprints": {split: dataset.fingerprint for split, dataset in datasets.items()},
            "source": datasets["train"].info.source,
        }
        write_whole(path, json.dumps(facts, indent=1) + "\n")
        return facts


def _entries(dataset: Dataset, split: str) -> Iterable[Entry]:
    """All documents of a dataset."""
    for index in range(len(dataset.shards)):
        shard = open_shard(dataset, index)
        for document in range(len(shard)):
            meta = shard.meta(document)
            length = int(shard.lengths[document])
            yield Entry(split, index, document, str(meta["id"]), str(meta.get("group", "")), length)


class _Open:
    """Opens each shard once."""

    def __init__(self, datasets: dict[str, Dataset]) -> None:
        self._datasets = datasets
        self._shards: dict[tuple[str, int], Shard] = {}

    def __call__(self, entry: Entry) -> Shard:
        key = entry.split, entry.shard
        if key not in self._shards:
            self._shards[key] = open_shard(self._datasets[entry.split], entry.shard)
        return self._shards[key]


def _write(
    datasets: dict[str, Dataset],
    entries: Sequence[Entry],
    out: Path,
    normalizer: Path,
    dtype: str | None = None,
    steps: Quantization | None = None,
) -> None:
    """Write documents as a dataset.

    Args:
        datasets: They are from, by split.
        entries: The documents, in order.
        out: The new folder.
        normalizer: The dataset whose normaliser it gets.
        dtype: Of the stored concepts; None for that of `datasets`, byte for byte.
        steps: Of int8.
    """
    out.mkdir(parents=True)
    shard_of = _Open(datasets)
    parts: list[list[Entry]] = [[]]
    for entry in entries:
        if sum(each.concepts for each in parts[-1]) >= SHARD_CONCEPTS:
            parts.append([])
        parts[-1].append(entry)
    for number, part in enumerate(parts):
        with ShardWriter(out, f"{number:06d}.tar", dtype or "float16", steps) as writer:
            for place, entry in enumerate(part):
                shard, key = shard_of(entry), f"{place:06d}"
                if dtype is None:
                    writer.add_members(key, shard.members(entry.document), False)
                    continue
                meta, concepts = shard.meta(entry.document), shard.concepts(entry.document)
                sentences = meta["sentences"]
                writer.add(Document(key, meta["id"], meta["source"], sentences, concepts, group=meta.get("group")))
            commit(out, writer.finish())
    center, scale = read_normalizer(normalizer)
    write_normalizer(out, center, scale, {"of": normalizer.name})
    info = next(iter(datasets.values())).info
    changes: dict[str, Any] = {"source": {"name": "part", "of": info.source, "group_column": "file_path"}}
    if dtype is not None:
        quantization = None if steps is None else QuantParams(center=steps.center.tolist(), step=steps.step.tolist())
        changes |= {"dtype": dtype, "quantization": quantization}
    finish(out, info.model_copy(update=changes))


def _concepts(dataset: Dataset) -> Iterable[np.ndarray]:
    """The concepts of each shard, without ends of text, fp32 [n, embed_dim]."""
    for index in range(len(dataset.shards)):
        shard = open_shard(dataset, index)
        yield np.concatenate([shard.concepts(document)[:-1].astype(np.float32) for document in range(len(shard))])


def _sentences(datasets: dict[str, Dataset], entries: Sequence[Entry], path: Path) -> None:
    """Write documents as parquet with a column of lists of sentences, without ends of text."""
    import pyarrow
    import pyarrow.parquet

    shard_of = _Open(datasets)
    rows = [
        {
            "id": entry.id,
            "file_path": entry.group,
            "sentences": shard_of(entry).meta(entry.document)["sentences"][:-1],
        }
        for entry in entries
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)


def _texts(paths: Sequence[str], ids: set[str], path: Path) -> None:
    """Write the rows of a corpus that have these ids."""
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    from lcm_ds.text.files import expand

    columns = ["id", "file_path", "text"]
    tables = [pyarrow.parquet.read_table(file, columns=columns) for file in expand(list(paths))]
    table = pyarrow.concat_tables(tables)
    kept = table.filter(pyarrow.compute.is_in(table["id"], pyarrow.array(sorted(ids))))
    pyarrow.parquet.write_table(kept, path, row_group_size=100)


def _long_sentences(datasets: dict[str, Dataset], entries: Iterable[Entry]) -> Iterable[str]:
    shard_of = _Open(datasets)
    for entry in entries:
        for sentence in shard_of(entry).meta(entry.document)["sentences"][:-1]:
            if len(sentence) >= SAME_CHARACTERS:
                yield sentence
