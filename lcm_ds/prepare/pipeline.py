"""Text → dataset: documents, sentences, concepts, shards, and at the end the normaliser and dataset.json.

A unit is a range of `documents_per_shard` documents of the source; its shards, one in train/ and one in validation/,
are a function of the unit alone. A line of units.jsonl says that a unit is done. So a run that was killed anywhere goes
on after its last unit, and ends with the same bytes as one that was not.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lcm_ds.config import PrepareConfig, dump
from lcm_ds.data.format import DATASET, SHARDS, DatasetInfo, EndOfText, commit, finish, read_shards, write_normalizer
from lcm_ds.data.normalizer import UniformSample, constant, fit
from lcm_ds.data.reader import Shard
from lcm_ds.data.writer import Document, write_shard
from lcm_ds.encoders import Encoder, load_encoder
from lcm_ds.errors import InputError
from lcm_ds.files import sync_folder, write_whole
from lcm_ds.prepare.progress import Progress
from lcm_ds.text.sentences import Splitter
from lcm_ds.text.sources import Source, TextDocument, open_source

SPLITS = ("train", "validation")
CONFIG, PARTS, UNITS, LOCK = "prepare.yaml", "parts.json", "units.jsonl", "prepare.lock"


@dataclass
class Unit:
    """What became of a unit's documents: a line of units.jsonl."""

    unit: int
    given: int = 0
    kept: dict[str, int] = field(default_factory=dict)  # documents of each split
    refused: dict[str, int] = field(default_factory=dict)  # documents by reason
    sentences: int = 0  # of the documents kept, the end-of-text not counted
    encoded: int = 0  # different ones among those that were encoded


@dataclass(frozen=True)
class Work:
    """A preparation: what is read, what is made of it, and where it goes."""

    config: PrepareConfig
    out: Path
    source: Source
    splitter: Splitter
    encoder: Encoder
    end: np.ndarray  # fp32 [embed_dim]: the end-of-text concept


def prepare(config: PrepareConfig, encoder: Encoder | None = None) -> None:
    """Make the datasets OUT/train and OUT/validation, or go on making them where a former call was ended.

    encoder: instead of loading the one the config names. A finished dataset is left as it is. Raises InputError for a
    source or an encoder that cannot be used, an output folder of another config or in use, an encoder, a source or a
    splitter that is not what it was when the dataset was begun, and for a source that gives no documents to train on.
    """
    out = Path(config.output)
    if _is_finished(out, config):
        print(f"{out}: already prepared: {_summary(_read_units(out))}")
        return
    # Before the folder is there: a mistake in the config leaves nothing behind.
    source, splitter = open_source(config.source, config.sentences), Splitter(config.sentences)
    encoder = encoder or load_encoder(config.encoder)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: output: cannot be made: {error.strerror}") from None
    with _owned(out):
        # Again, now that nobody else can: since then a process with another config may have been here. (One that has
        # finished this very dataset has left nothing to do: what follows writes the same files once more.)
        _is_finished(out, config)
        write_whole(out / CONFIG, dump(config))
        units = _read_units(out)
        if units:
            print(f"{out}: going on after {_summary(units)}", flush=True)
        _drop_unfinished(out, {unit.unit for unit in units})
        work = Work(config, out, source, splitter, encoder, _end_of_text(config, encoder))
        _check_parts(work)
        _make_units(work, units)
        _finish(work, units)
    print(f"{out}: {_summary(units)}")


def split_of(document_id: str, validation: float) -> str:
    """The split a document belongs to: a function of its id and the share of validation alone."""
    digest = hashlib.blake2b(document_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "little") < validation * 2**64 else "train"


def _end_of_text(config: PrepareConfig, encoder: Encoder) -> np.ndarray:
    """The end-of-text concept; one that cannot be stored would refuse every document, after hours of encoding."""
    end = encoder.encode([config.end_of_text])[0]
    if not _storable(end, config.dtype):
        raise InputError(f"end_of_text: the encoder makes {config.end_of_text!r} a concept that is not finite")
    return end


def _storable(concepts: np.ndarray, dtype: str) -> bool:
    """Whether all numbers are finite, as `dtype` too."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(concepts.astype(dtype)).all())


def _make_units(work: Work, units: list[Unit]) -> None:
    """Make the units that are not done yet and add them to `units`."""
    source, size = work.source, work.config.documents_per_shard
    done = {unit.unit for unit in units}
    number = 0
    with Progress(source.total, given=sum(unit.given for unit in units)) as progress:
        while source.total is None or number * size < source.total:
            if number not in done:
                texts = list(source.documents(number * size, (number + 1) * size))
                if not texts:
                    break
                unit = _make_unit(work, number, texts)
                units.append(unit)
                progress.add(unit.given, unit.sentences)
            number += 1


def _make_unit(work: Work, number: int, texts: list[TextDocument]) -> Unit:
    """Sentences, concepts and shards of one unit, committed."""
    config, out, end = work.config, work.out, work.end
    unit = Unit(number, given=len(texts))
    refused: Counter[str] = Counter()
    chosen: list[tuple[int, TextDocument, list[str]]] = []
    for place, (text, sentences, reason) in enumerate(_judged(work, texts)):
        if reason is None:
            chosen.append((number * config.documents_per_shard + place, text, sentences))
        else:
            refused[reason] += 1
    # A sentence that stands in a unit several times is encoded once.
    distinct = list(dict.fromkeys(sentence for *_, sentences in chosen for sentence in sentences))
    row = {sentence: index for index, sentence in enumerate(distinct)}
    concepts = work.encoder.encode(distinct) if distinct else np.empty((0, len(end)), np.float32)
    documents: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for index, text, sentences in chosen:
        own = np.vstack([concepts[[row[sentence] for sentence in sentences]], end])
        if not _storable(own, config.dtype):
            refused["not_finite"] += 1
            continue
        split = split_of(text.id, config.validation)
        documents[split].append(Document(f"{index:012d}", text.id, text.source, [*sentences, config.end_of_text], own))
        unit.sentences += len(sentences)
    unit.encoded = len(distinct)
    unit.kept = {split: len(kept) for split, kept in documents.items()}
    unit.refused = dict(sorted(refused.items()))
    for split, kept in documents.items():
        if kept:
            folder = out / split
            if not folder.exists():
                folder.mkdir()
                sync_folder(out)
            commit(folder, write_shard(folder, f"{number:08d}.tar", kept, config.dtype))
    with (out / UNITS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(unit)) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return unit


def _judged(work: Work, texts: Iterable[TextDocument]) -> Iterator[tuple[TextDocument, list[str], str | None]]:
    """Each document of a unit with its sentences, and why it is refused, or None."""
    ids: set[str] = set()
    for text in texts:
        sentences: list[str] = []
        reason = None
        if text.id in ids:
            reason = "duplicate_id"
        elif not text.text.strip():
            reason = "empty"
        else:
            sentences = work.splitter.split(text.text)
            if len(sentences) < work.config.min_sentences:
                reason = "too_few_sentences"
            elif work.config.max_sentences is not None and len(sentences) > work.config.max_sentences:
                reason = "too_many_sentences"
        ids.add(text.id)
        yield text, sentences, reason


def _finish(work: Work, units: list[Unit]) -> None:
    """The normaliser, fitted on the training split, and dataset.json of both splits, which makes them datasets."""
    config, out, end = work.config, work.out, work.end
    given, kept, refused = _counts(units)
    if not kept["train"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in refused.items()) or "the source is empty"
        raise InputError(f"{out}: none of {given} documents is left to train on ({reasons})")
    train = out / "train"
    sample = UniformSample(config.normalizer_samples)
    for line in read_shards(train):
        shard = Shard(train / line.name, line, len(end), config.dtype)
        sample.add(line.name, np.concatenate([shard.concepts(i) for i in range(len(shard))]))
    samples = sample.concepts()
    center, scale = fit(samples)
    statistics = {
        "concepts": sample.count,
        "samples": len(samples),
        "percentiles": [25, 50, 75],
        "constant_dimensions": constant(samples).tolist(),
    }
    for split in SPLITS:
        if not kept[split]:
            continue
        write_normalizer(out / split, center, scale, statistics)
        info = DatasetInfo(
            encoder=work.encoder.describe(),
            embed_dim=len(end),
            dtype=config.dtype,  # type: ignore[arg-type]
            language=config.sentences.language,
            splitter=work.splitter.settings(),
            end_of_text=EndOfText(text=config.end_of_text, vector=[float(value) for value in end]),
            source={
                **work.source.describe(),
                "split": split,
                "validation_share": config.validation,
                "given": given,
                "kept": dict(kept),
                "refused": dict(sorted(refused.items())),
            },
        )
        finish(out / split, info)
    if config.validation and not kept["validation"]:
        print(f"{out}: no document fell into validation (a share of {config.validation} of {given})")


# --- what a former call has left --------------------------------------------------------------------------------------


def _is_finished(out: Path, config: PrepareConfig) -> bool:
    """Whether the dataset is there. Raises InputError where the folder belongs to another config."""
    if not (out / CONFIG).exists():
        if out.exists() and not out.is_dir():
            raise InputError(f"{out}: output: is a file; name a folder")
        # A call that was killed at its very start has left no more than these.
        if out.exists() and any(path.name not in (LOCK, f"{CONFIG}.partial") for path in out.iterdir()):
            raise InputError(f"{out}: output: is not empty and holds no {CONFIG}; choose a new folder")
        return False
    _check_same(out, yaml.safe_load((out / CONFIG).read_text(encoding="utf-8")), config.model_dump(mode="json"))
    if not (out / "train" / DATASET).exists():
        return False
    return (out / "validation" / DATASET).exists() or not any(u.kept["validation"] for u in _read_units(out))


def _check_parts(work: Work) -> None:
    """Refuse to go on with parts that are no longer what they were: half the dataset would be made otherwise.

    The config alone does not tell: a hub's newest revision changes, an automatic dtype depends on the device, new files
    match a glob, the documentation that `sample` reads comes with Python.
    """
    parts = {
        "encoder": work.encoder.describe(),
        "sentences": work.splitter.settings(),
        "source": work.source.describe(),
    }
    text = json.dumps(parts, indent=2, ensure_ascii=False) + "\n"
    path = work.out / PARTS
    if path.exists():
        _check_same(work.out, json.loads(path.read_text(encoding="utf-8")), json.loads(text))
    else:
        write_whole(path, text)


def _check_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError with a line for each key whose value is not what it was when this dataset was begun."""
    was, is_now = _flat(before), _flat(now)
    differing = sorted(key for key in was.keys() | is_now.keys() if was.get(key) != is_now.get(key))
    if differing:
        raise InputError(
            f"{out}: {key}: was {was.get(key)!r} when this dataset was begun and is now {is_now.get(key)!r}; "
            "choose a new output or go back"
            for key in differing
        )


def _flat(mapping: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted keys of nested mappings; the output's own path may be written in more than one way."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{above}{key}."))
        elif f"{above}{key}" != "output":
            flat[f"{above}{key}"] = value
    return flat


def _read_units(out: Path) -> list[Unit]:
    """The units that are done; a line that a crash cut short is removed."""
    path = out / UNITS
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole, _, torn = text.rpartition("\n")
    if torn:
        write_whole(path, whole + "\n" if whole else "")
    return [Unit(**json.loads(line)) for line in whole.splitlines()]


def _drop_unfinished(out: Path, done: set[int]) -> None:
    """Take back shards of units that were not finished: they are made again."""
    for split in SPLITS:
        path = out / split / SHARDS
        if path.exists():
            shards = [shard for shard in read_shards(path.parent) if int(Path(shard.name).stem) in done]
            write_whole(path, "".join(shard.line() + "\n" for shard in shards))


@contextmanager
def _owned(out: Path) -> Iterator[None]:
    """Hold the output folder; a second process is refused. However this one ends, the kernel lets go of it."""
    with (out / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{out}: another process is preparing this dataset") from None
        yield


def _summary(units: list[Unit]) -> str:
    """Documents and sentences of the units, in a line."""
    given, kept, refused = _counts(units)
    reasons = "".join(f", {count:,} refused ({reason})" for reason, count in sorted(refused.items()))
    sentences = sum(unit.sentences for unit in units)
    return (
        f"{given:,} documents: {kept['train']:,} to train on, {kept['validation']:,} for validation{reasons}; "
        f"{sentences:,} sentences"
    )


def _counts(units: list[Unit]) -> tuple[int, Counter[str], Counter[str]]:
    """Documents of the units: given, kept by split, refused by reason."""
    kept, refused = Counter[str](), Counter[str]()
    for unit in units:
        kept.update(unit.kept)
        refused.update(unit.refused)
    return sum(unit.given for unit in units), kept, refused
