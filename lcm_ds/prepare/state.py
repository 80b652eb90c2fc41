"""The output folder of a preparation: whose it is, what is done in it, and what a call that was killed has left."""

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

import yaml

from lcm_ds.config import PrepareConfig
from lcm_ds.data.format import DATASET, SHARDS, SPLITS, read_shards
from lcm_ds.errors import InputError
from lcm_ds.files import write_whole

CONFIG, PARTS, SOURCE, QUANTIZATION = "prepare.yaml", "parts.json", "source.json", "quantization.json"
UNITS, IDS, LOCK = "units.jsonl", "ids", "prepare.lock"

# What decides how a dataset is made, not what is in it.
RUNTIME_ONLY_KEYS = ("output", "processes", "split_workers", "max_refused", "check_space", "encoder.device")


@dataclass
class UnitResult:
    """What became of a unit's documents: a line of units.jsonl."""

    unit: int
    given: int = 0
    kept: dict[str, int] = field(default_factory=dict)  # documents of each split
    refused: dict[str, int] = field(default_factory=dict)  # documents by reason
    sentences: int = 0  # of the documents kept, the end-of-text not counted
    encoded: int = 0  # different ones among those that were encoded
    not_encoded: dict[str, str] = field(default_factory=dict)  # documents that no concept could be made of, and why
    unreadable: list[str] = field(default_factory=list)  # where documents are that could not be read, and why

    @property
    def documents(self) -> int:
        """Documents kept."""
        return sum(self.kept.values())

    @property
    def problems(self) -> list[str]:
        """What was wrong with the documents that could not be read or encoded, a line each."""
        return [
            *(f"not read: {problem}" for problem in self.unreadable),
            *(f"not encoded: document {id}: {reason}" for id, reason in self.not_encoded.items()),
        ]


def is_finished(out: Path, config: PrepareConfig) -> bool:
    """Whether the dataset is there. Raises InputError where the folder belongs to another config."""
    if not (out / CONFIG).exists():
        if out.exists() and not out.is_dir():
            raise InputError(f"{out}: output: is a file; name a folder")
        # The launcher, or a call that was killed at its very start, has left no more than these.
        harmless = (LOCK, f"{CONFIG}.partial", "launch")
        if out.exists() and any(path.name not in harmless for path in out.iterdir()):
            raise InputError(f"{out}: output: is not empty and holds no {CONFIG}; choose a new folder")
        return False
    check_same(out, yaml.safe_load((out / CONFIG).read_text(encoding="utf-8")), config.model_dump(mode="json"))
    if not (out / "train" / DATASET).exists():
        return False
    return (out / "validation" / DATASET).exists() or not any(u.kept["validation"] for u in read_units(out))


def check_parts(out: Path, parts: dict[str, Any]) -> None:
    """Refuse to go on with parts that are no longer what they were: half the dataset would be made otherwise.

    The config alone does not tell: a hub's newest revision changes, an automatic dtype depends on the device, new files
    match a glob, the documentation that `sample` reads comes with Python.
    """
    text = json.dumps(parts, indent=2, ensure_ascii=False) + "\n"
    if (out / PARTS).exists():
        check_same(out, json.loads((out / PARTS).read_text(encoding="utf-8")), json.loads(text))
    else:
        write_whole(out / PARTS, text)


def check_files(out: Path, before: dict[str, int], now: dict[str, int]) -> None:
    """Raise InputError with a line for each file of the source that has changed since this dataset was begun.

    before, now: bytes of each file.
    """
    remedy = "restore it, or choose a new output (rows that cannot be read need no mending: see max_refused)"
    new = now.keys() - before.keys()
    errors = [f"{name}: new since {out} was begun: take it away, or choose a new output" for name in new]
    for name, size in before.items():
        if name not in now:
            errors.append(f"{name}: gone since {out} was begun: {remedy}")
        elif now[name] != size:
            errors.append(f"{name}: has {now[name]} bytes, but had {size} when {out} was begun: {remedy}")
    if errors:
        raise InputError(sorted(errors))


def check_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
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
    """Dotted keys of nested mappings, but those that do not change what is made."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{name}."))
        elif name not in RUNTIME_ONLY_KEYS:
            flat[name] = value
    return flat


def read_units(out: Path) -> list[UnitResult]:
    """The units whose line is whole; a line that a crash cut short is removed."""
    path = out / UNITS
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole, _, torn = text.rpartition("\n")
    if torn:
        write_whole(path, whole + "\n" if whole else "")
    return [UnitResult(**json.loads(line)) for line in whole.splitlines()]


def add_unit(out: Path, unit: UnitResult) -> None:
    """Append the unit's line and sync it: from then on the unit is done."""
    with (out / UNITS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(unit)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def keep_units(out: Path, units: Iterable[UnitResult]) -> None:
    """Make these the units that are done; the shards of all others are taken back, to be made again."""
    units = list(units)
    write_whole(out / UNITS, "".join(json.dumps(asdict(unit)) + "\n" for unit in units))
    _take_back_shards(out, {unit.unit for unit in units})


def tidy(out: Path, done: set[int]) -> None:
    """Remove what is not part of the dataset: shards of units that are not done, and files that were cut short."""
    _take_back_shards(out, done)
    for split in SPLITS:
        folder = out / split
        listed = {shard.name for shard in read_shards(folder)} if folder.exists() else set()
        for path in folder.glob("*.tar*"):
            if path.name not in listed:
                path.unlink(missing_ok=True)


def _take_back_shards(out: Path, done: set[int]) -> None:
    for split in SPLITS:
        path = out / split / SHARDS
        if path.exists():
            shards = read_shards(path.parent)
            kept = [shard for shard in shards if int(Path(shard.name).stem) in done]
            if len(kept) < len(shards):
                write_whole(path, "".join(shard.line() + "\n" for shard in kept))


def shard_name(unit: int) -> str:
    """The name of the unit's shard in each split."""
    return f"{unit:08d}.tar"


def split_of(key: str, validation: float) -> str:
    """The split that a document of this `split_key` belongs to: a function of that and the share of validation only."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "little") < validation * 2**64 else "train"


@contextmanager
def owned(out: Path) -> Iterator[None]:
    """Hold the output folder; a second process is refused. However this one ends, the kernel lets go of it."""
    with (out / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{out}: another process is preparing this dataset") from None
        except OSError as error:  # some file systems of clusters have no locks
            print(f"{out}: cannot be locked ({error.strerror}): see to it that nothing else writes there", flush=True)
        yield


def counts(units: Iterable[UnitResult]) -> tuple[int, Counter[str], Counter[str]]:
    """Documents of the units: given, kept by split, refused by reason."""
    given, kept, refused = 0, Counter[str](), Counter[str]()
    for unit in units:
        given += unit.given
        kept.update(unit.kept)
        refused.update(unit.refused)
    return given, kept, refused


def summary(units: list[UnitResult]) -> str:
    """Documents and sentences of the units, in a line."""
    given, kept, refused = counts(units)
    reasons = "".join(f", {count:,} refused ({reason})" for reason, count in sorted(refused.items()))
    sentences = sum(unit.sentences for unit in units)
    return (
        f"{given:,} documents: {kept['train']:,} to train on, {kept['validation']:,} for validation{reasons}; "
        f"{sentences:,} sentences"
    )
