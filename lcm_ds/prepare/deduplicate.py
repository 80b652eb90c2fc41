"""Ids that occur in more than one unit: the first document in the order of the source keeps its id, the others go.

Whether an id occurs in another unit is known only when all units are made. So each unit leaves hashes of its ids, and
at the end those that occur again are looked at and taken out of their shards, which needs no encoder.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lcm_ds.data.format import SPLITS, commit
from lcm_ds.data.shard import Shard
from lcm_ds.data.writer import copy_shard
from lcm_ds.files import write_whole
from lcm_ds.prepare.state import IDS, UnitResult, add_unit, keep_units, shard_name

REASON = "duplicate_id"


def write_ids(out: Path, unit: int, ids: Sequence[str]) -> None:
    """Leave the hashes of a unit's ids for later."""
    write_whole(_file(out, unit), _hashes(ids).tobytes())


def has_ids(out: Path, unit: int) -> bool:
    """Whether the unit has left them; it is not done without."""
    return _file(out, unit).exists()


def forget_ids(out: Path) -> None:
    """Remove the hashes of all units: the dataset is finished."""
    shutil.rmtree(out / IDS, ignore_errors=True)


def drop_duplicates(out: Path, units: list[UnitResult], supervised: bool = False) -> list[UnitResult]:
    """Take documents whose id occurs in an earlier unit out of the shards.

    Args:
        out: the output of prepare.
        units: those that are done.
        supervised: whether documents have a source and a target.

    Returns:
        What the units are then.
    """
    repeated = _repeated(out, units)
    if not repeated:
        return units
    seen: set[str] = set()
    changed: dict[int, dict[str, list[int]]] = {}  # unit → split → documents that stay
    for unit in sorted(repeated):
        again: set[str] = set()
        stay: dict[str, list[int]] = {}
        for split, shard in _shards(out, unit, supervised).items():
            ids = [str(shard.meta(document)["id"]) for document in range(len(shard))]
            suspects = set(repeated[unit]).intersection(_hashes(ids).tolist())
            doubtful = {id for id in ids if _hashes([id])[0] in suspects}
            stay[split] = [document for document, id in enumerate(ids) if id not in doubtful or id not in seen]
            again |= doubtful
            if len(stay[split]) < len(ids):
                changed[unit] = stay
        seen |= again
    return _rewritten(out, units, changed, supervised)


def _rewritten(
    out: Path, units: list[UnitResult], changed: dict[int, dict[str, list[int]]], supervised: bool
) -> list[UnitResult]:
    """Write the shards of the changed units again, without the documents that go."""
    # Mapped: what is renamed over them does not touch them.
    shards = {unit: _shards(out, unit, supervised) for unit in changed}
    # From here on they are not done: killed now, they are made once more from their texts.
    keep_units(out, [unit for unit in units if unit.unit not in changed])
    result = []
    for unit in units:
        if unit.unit in changed:
            kept: dict[str, int] = {}
            ids: list[str] = []
            sentences = 0
            for split, documents in changed[unit.unit].items():
                shard = shards[unit.unit][split]
                kept[split] = len(documents)
                ids += [str(shard.meta(document)["id"]) for document in documents]
                sentences += int(shard.lengths[documents].sum()) - len(documents)
                if documents:
                    commit(out / split, copy_shard(shard, documents, out / split, shard_name(unit.unit)))
            kept = {split: kept.get(split, 0) for split in SPLITS}
            gone = unit.documents - sum(kept.values())
            refused = {**unit.refused, REASON: unit.refused.get(REASON, 0) + gone}
            unit = replace(unit, kept=kept, refused=dict(sorted(refused.items())), sentences=sentences)
            write_ids(out, unit.unit, ids)
            add_unit(out, unit)
        result.append(unit)
    return result


def _repeated(out: Path, units: list[UnitResult]) -> dict[int, list[int]]:
    """Units and those of their ids' hashes that occur in several units."""
    own = {unit.unit: np.frombuffer(_file(out, unit.unit).read_bytes(), np.uint64) for unit in units}
    if not own:
        return {}
    hashes = np.concatenate(list(own.values()))
    hashes.sort()
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not len(repeated):
        return {}
    found: dict[int, list[int]] = defaultdict(list)
    for unit, values in own.items():
        again = values[np.isin(values, repeated)]
        if len(again):
            found[unit] = again.tolist()
    return dict(found)


def _shards(out: Path, unit: int, supervised: bool) -> dict[str, Shard]:
    """The unit's shards by split."""
    name = shard_name(unit)
    found = {}
    for split in SPLITS:
        if (out / split / name).exists():
            found[split] = Shard(out / split / name, supervised=supervised)
    return found


def _hashes(ids: Sequence[str]) -> np.ndarray:
    """uint64 [len(ids)]."""
    digests = [hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).digest() for id in ids]
    return np.frombuffer(b"".join(digests), np.uint64)


def _file(out: Path, unit: int) -> Path:
    return out / IDS / f"{unit:08d}"
