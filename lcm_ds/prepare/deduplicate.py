"""Ids that occur in more than one unit: only the first document, in the order of the source, is kept.

Duplicates are known only after all units are made. So each unit writes hashes of its ids, and at the end the later
documents are removed from their shards, which needs no encoder.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
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
    """Write the hashes of a unit's ids."""
    write_whole(_file(out, unit), _hashes(ids).tobytes())


def has_ids(out: Path, unit: int) -> bool:
    """Whether a unit's hashes exist; without them it is not done."""
    return _file(out, unit).exists()


def remove_ids(out: Path) -> None:
    """Remove the hashes of all units, once the dataset is finished."""
    shutil.rmtree(out / IDS, ignore_errors=True)


def drop_duplicates(
    out: Path, units: list[UnitResult], supervised: bool = False, ends: bool = True
) -> list[UnitResult]:
    """Remove documents whose id occurs in an earlier unit from the shards.

    Args:
        out: The output of prepare.
        units: Those that are done.
        supervised: Whether documents have a source and a target.
        ends: Whether each document ends with the end of text.

    Returns:
        The units afterwards.
    """
    repeated = _repeated(out, units)
    if not repeated:
        return units
    seen: set[str] = set()
    changed: dict[int, dict[str, list[int]]] = {}  # unit → split → documents to keep
    for unit in sorted(repeated):
        candidates: set[str] = set()  # ids that may occur in several units
        kept: dict[str, list[int]] = {}
        for split, shard in _shards(out, unit, supervised).items():
            ids = [str(shard.meta(document)["id"]) for document in range(len(shard))]
            hashes = set(repeated[unit]).intersection(_hashes(ids).tolist())
            repeated_ids = {id for id in ids if _hashes([id])[0] in hashes}
            kept[split] = [document for document, id in enumerate(ids) if id not in repeated_ids or id not in seen]
            candidates |= repeated_ids
            if len(kept[split]) < len(ids):
                changed[unit] = kept
        seen |= candidates
    return _rewrite(out, units, changed, supervised, ends)


def _rewrite(
    out: Path, units: list[UnitResult], changed: dict[int, dict[str, list[int]]], supervised: bool, ends: bool
) -> list[UnitResult]:
    """Rewrite the shards of the changed units with the documents to keep.

    Args:
        out: The output of prepare.
        units: Those that are done.
        changed: The documents to keep, by unit and split.
        supervised: Whether documents have a source and a target.
        ends: Whether each document ends with the end of text.

    Returns:
        The units afterwards.
    """
    # Opened files: new shards that are renamed over them do not change them.
    shards = {unit: _shards(out, unit, supervised) for unit in changed}
    # From here on they are not done: if this process is killed now, they are made again from their texts.
    keep_units(out, [unit for unit in units if unit.unit not in changed])
    result = []
    for unit in units:
        if unit.unit in changed:
            kept: dict[str, int] = {}
            ids: list[str] = []
            sentences = 0
            languages: Counter[str] = Counter()
            for split, documents in changed[unit.unit].items():
                shard = shards[unit.unit][split]
                kept[split] = len(documents)
                metas = [shard.meta(document) for document in documents]
                ids += [str(meta["id"]) for meta in metas]
                languages.update(meta["language"] for meta in metas if "language" in meta)
                sentences += int(shard.lengths[documents].sum()) - len(documents) * ends
                if documents:
                    commit(out / split, copy_shard(shard, documents, out / split, shard_name(unit.unit)))
            kept = {split: kept.get(split, 0) for split in SPLITS}
            removed = unit.documents - sum(kept.values())
            refused = {**unit.refused, REASON: unit.refused.get(REASON, 0) + removed}
            refused = dict(sorted(refused.items()))
            unit = replace(unit, kept=kept, refused=refused, sentences=sentences, languages=dict(languages))
            write_ids(out, unit.unit, ids)
            add_unit(out, unit)
        result.append(unit)
    return result


def _repeated(out: Path, units: list[UnitResult]) -> dict[int, list[int]]:
    """The hashes of ids that occur in several units, by unit."""
    by_unit = {unit.unit: np.frombuffer(_file(out, unit.unit).read_bytes(), np.uint64) for unit in units}
    if not by_unit:
        return {}
    hashes = np.concatenate(list(by_unit.values()))
    hashes.sort()
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not len(repeated):
        return {}
    return {
        unit: values[mask].tolist() for unit, values in by_unit.items() if (mask := np.isin(values, repeated)).any()
    }


def _shards(out: Path, unit: int, supervised: bool) -> dict[str, Shard]:
    """The unit's shards by split."""
    paths = {split: out / split / shard_name(unit) for split in SPLITS}
    return {split: Shard(path, supervised=supervised) for split, path in paths.items() if path.exists()}


def _hashes(ids: Sequence[str]) -> np.ndarray:
    """uint64 [len(ids)]."""
    digests = [hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).digest() for id in ids]
    return np.frombuffer(b"".join(digests), np.uint64)


def _file(out: Path, unit: int) -> Path:
    return out / IDS / f"{unit:08d}"
