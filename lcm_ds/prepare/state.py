"""The output folder of a preparation: its config, the units that are done, and what a killed call has left behind."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lcm_ds.config import PrepareConfig
from lcm_ds.data.format import DATASET, SHARDS, SPLITS, read_shards, record_path
from lcm_ds.errors import InputError
from lcm_ds.files import lock, read_object, write_whole

CONFIG, PARTS, SOURCE, QUANTIZATION = "prepare.yaml", "parts.json", "source.json", "quantization.json"
UNITS, IDS, LOCK, REPORTS = "units.jsonl", "ids", "prepare.lock", "reports"

# Keys that decide how a dataset is made, not what is in it.
RUNTIME_ONLY_KEYS = ("output", "processes", "split_workers", "max_refused", "check_space", "encoder.device")


@dataclass
class UnitResult:
    """The counts of a unit: a line of units.jsonl."""

    unit: int
    given: int = 0
    kept: dict[str, int] = field(default_factory=dict)  # documents of each split
    refused: dict[str, int] = field(default_factory=dict)  # documents by reason
    sentences: int = 0  # of the documents kept, without the end of text
    encoded: int = 0  # distinct sentences
    not_encoded: dict[str, str] = field(default_factory=dict)  # document ids and errors
    unreadable: list[str] = field(default_factory=list)  # positions of documents and errors
    languages: dict[str, int] = field(default_factory=dict)  # documents kept by language, of a source of several
    lists: int = 0  # documents kept that came as lists of sentences
    largest_error: float | None = None  # of adopted concepts: the largest change of a number by storing it

    def line(self) -> str:
        """The unit as JSON with a newline, without keys that are None."""
        return json.dumps({key: value for key, value in asdict(self).items() if value is not None}) + "\n"

    @property
    def documents(self) -> int:
        """Documents kept."""
        return sum(self.kept.values())

    @property
    def problems(self) -> list[str]:
        """A line for each document that could not be read or encoded."""
        return [
            *(f"not read: {problem}" for problem in self.unreadable),
            *(f"not encoded: document {id}: {reason}" for id, reason in self.not_encoded.items()),
        ]


def is_finished(out: Path, config: PrepareConfig) -> bool:
    """Whether the dataset is complete. Raises InputError if the folder belongs to another config."""
    if not (out / CONFIG).exists():
        if out.exists() and not out.is_dir():
            raise InputError(f"{out}: output: is a file; name a folder")
        # All that the launcher, or a call that was killed at its start, may have left.
        harmless = (LOCK, REPORTS, f"{CONFIG}.partial", "launch")
        if out.exists() and any(path.name not in harmless for path in out.iterdir()):
            raise InputError(f"{out}: output: is not empty and holds no {CONFIG}; choose a new folder")
        return False
    before, now = yaml.safe_load((out / CONFIG).read_text(encoding="utf-8")), config.model_dump(mode="json")
    for each in (before, now):
        if each.get("encoder"):
            each["encoder"]["backend"] = each["encoder"].get("backend") or backend_of(out)
    check_same(out, before, now)
    if not (out / "train" / DATASET).exists():
        return False
    return (out / "validation" / DATASET).exists() or not any(u.kept["validation"] for u in read_units(out))


def backend_of(out: Path) -> str | None:
    """The `encoder.backend` that a dataset was started with; None for a new one."""
    return read_object(out / PARTS)["encoder"].get("backend", "torch") if (out / PARTS).exists() else None


def check_parts(out: Path, parts: dict[str, Any]) -> None:
    """Refuse to resume with another encoder, splitter or source than the dataset was started with.

    The config does not show all changes: a hub's newest revision changes, an automatic dtype depends on the device, new
    files match a glob.
    """
    text = json.dumps(parts, indent=2, ensure_ascii=False) + "\n"
    if (out / PARTS).exists():
        check_same(out, json.loads((out / PARTS).read_text(encoding="utf-8")), json.loads(text))
    else:
        write_whole(out / PARTS, text)


def check_files(out: Path, before: dict[str, int], now: dict[str, int]) -> None:
    """Raise InputError with a line for each file of the source that has changed since this dataset was started.

    Args:
        out: The output folder.
        before: Bytes of each file at the start.
        now: Bytes of each file now.
    """
    remedy = "restore it, or choose a new output (unreadable rows need no repair: see max_refused)"
    new = now.keys() - before.keys()
    errors = [f"{name}: new since {out} was started: remove it, or choose a new output" for name in new]
    for name, size in before.items():
        if name not in now:
            errors.append(f"{name}: missing since {out} was started: {remedy}")
        elif now[name] != size:
            errors.append(f"{name}: has {now[name]} bytes, but had {size} when {out} was started: {remedy}")
    if errors:
        raise InputError(sorted(errors))


def check_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError with a line for each key whose value has changed since this dataset was started.

    Args:
        out: The output folder.
        before: Nested values at the start.
        now: Nested values now.
    """
    old, new = _flatten(before), _flatten(now)
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if differing:
        raise InputError(
            f"{out}: {key}: was {old.get(key)!r} when this dataset was started and is now {new.get(key)!r}; "
            "undo the change or choose a new output"
            for key in differing
        )


def _flatten(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings by dotted keys, without RUNTIME_ONLY_KEYS."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat.update(_flatten(value, f"{name}."))
        elif name not in RUNTIME_ONLY_KEYS:
            flat[name] = value
    return flat


def read_units(out: Path) -> list[UnitResult]:
    """The units that are done; a line that a crash has truncated is removed."""
    path = out / UNITS
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    complete, _, truncated = text.rpartition("\n")
    if truncated:
        write_whole(path, complete + "\n" if complete else "")
    return [UnitResult(**json.loads(line)) for line in complete.splitlines()]


def add_unit(out: Path, unit: UnitResult) -> None:
    """Append a unit's line and sync it, which makes the unit done."""
    with (out / UNITS).open("a", encoding="utf-8") as file:
        file.write(unit.line())
        file.flush()
        os.fsync(file.fileno())


def keep_units(out: Path, units: Iterable[UnitResult]) -> None:
    """Make these the only units that are done; the shards of others are uncommitted, to be made again."""
    units = list(units)
    write_whole(out / UNITS, "".join(unit.line() for unit in units))
    _uncommit_shards(out, {unit.unit for unit in units})


def save_report(out: Path, report: dict[str, Any]) -> None:
    """Keep the report of a unit, its shards written, until the process that commits it takes it up."""
    write_whole(out / REPORTS / f"{report['unit']['unit']:08d}.json", json.dumps(report))


def saved_reports(out: Path, done: set[int]) -> list[dict[str, Any]]:
    """The saved reports of units that are not done, in their order; only those whose files are all there."""
    found = []
    for path in sorted((out / REPORTS).glob("*[0-9].json")):
        if int(path.stem) not in done:
            report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            places = [(out / split / shard["name"], shard["bytes"]) for split, shard in report["shards"].items()]
            records = [record_path(tar.parent, tar.name) for tar, _ in places]
            whole = all(tar.exists() and tar.stat().st_size == size for tar, size in places)
            if whole and all(each.exists() for each in (*records, out / IDS / path.stem)):
                found.append(report)
    return found


def remove_reports(out: Path) -> None:
    """Remove all saved reports, once the dataset is finished."""
    shutil.rmtree(out / REPORTS, ignore_errors=True)


def tidy(out: Path, done: set[int]) -> None:
    """Remove what is not part of the dataset: shards of units that are neither done nor reported; incomplete files."""
    _uncommit_shards(out, done)
    reported = [shard["name"] for report in saved_reports(out, done) for shard in report["shards"].values()]
    spared = {name for shard in reported for name in (shard, record_path("", shard).name)}
    for split in SPLITS:
        folder = out / split
        listed = spared | {shard.name for shard in read_shards(folder)} if folder.exists() else spared
        for path in folder.glob("*.tar*"):
            if path.name not in listed:
                path.unlink(missing_ok=True)


def _uncommit_shards(out: Path, done: set[int]) -> None:
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
    """The split of a document, a function of its `split_key` and the share of validation."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "little") < validation * 2**64 else "train"


@contextmanager
def locked(out: Path, shared: bool = False) -> Iterator[None]:
    """Lock the output folder against other processes. The kernel releases the lock however this process ends.

    shared: other processes may hold it as well that share it.
    """
    with (out / LOCK).open("w") as file:
        try:
            lock(file.fileno(), (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB, out)
        except BlockingIOError:
            raise InputError(f"{out}: another process is preparing this dataset") from None
        yield


def counts(units: Iterable[UnitResult]) -> tuple[int, Counter[str], Counter[str]]:
    """Documents of the units: all, kept by split, refused by reason."""
    given, kept, refused = 0, Counter[str](), Counter[str]()
    for unit in units:
        given += unit.given
        kept.update(unit.kept)
        refused.update(unit.refused)
    return given, kept, refused


def summary(units: list[UnitResult]) -> str:
    """A line with the documents and sentences of the units."""
    given, kept, refused = counts(units)
    reasons = "".join(f", {count:,} refused ({reason})" for reason, count in sorted(refused.items()))
    sentences = sum(unit.sentences for unit in units)
    return (
        f"{given:,} documents: {kept['train']:,} to train on, {kept['validation']:,} for validation{reasons}; "
        f"{sentences:,} sentences"
    )
