"""Supervised documents: what is given is never a target, and the sentences of both parts are those of the concepts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcm_ds.data.batch import Batch, target_mask
from lcm_ds.data.format import (
    Dataset,
    DatasetInfo,
    Supervised,
    commit,
    finish,
    open_dataset,
    write_normalizer,
)
from lcm_ds.data.index.first_use import indexed
from lcm_ds.data.loader import Loader, validation_batches
from lcm_ds.data.plan import Plan
from lcm_ds.data.shard import open_shard, verify
from lcm_ds.data.supervised import missing_targets, source_of, target_reach
from lcm_ds.data.tools.index import index
from lcm_ds.data.trace import trace
from lcm_ds.data.writer import Document, copy_shard, write_shard
from lcm_ds.errors import InputError
from lcm_ds.prepare.deduplicate import drop_duplicates, write_ids
from lcm_ds.prepare.state import UnitResult, add_unit

PARTS = [(3, 2), (1, 4), (2, 3), (6, 1), (2, 2), (5, 5)]  # concepts of each document's source and target


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Dataset]:
    """make(parts, supervised=True): a dataset whose concepts say which document and position they are."""

    def make(parts: list[tuple[int, int]], supervised: bool = True) -> Dataset:
        folder = tmp_path_factory.mktemp("supervised")
        documents = []
        for i, (known, learned) in enumerate(parts):
            n = known + learned
            concepts = np.stack([np.full(n, i), np.arange(n)], axis=1).astype(np.float32)
            sentences = [f"Sentence {position} of {i}." for position in range(n)]
            part = known if supervised else None
            documents.append(Document(f"{i:04d}", f"text-{i}", "tests", sentences, concepts, part))
        for shard in range(0, len(documents), 3):
            commit(folder, write_shard(folder, f"{shard:04d}.tar", documents[shard : shard + 3]))
        write_normalizer(folder, np.zeros(2), np.ones(2), {})
        said = Supervised(source_suffix="[MODEL]:") if supervised else None
        finish(folder, DatasetInfo(encoder={"name": "tests"}, embed_dim=2, dtype="float16", supervised=said))
        return open_dataset(folder)

    return make


def targets(batches: list[Batch]) -> set[tuple[int, int]]:
    """Document and position of every target of some batches, told from the concepts; none comes twice."""
    found: list[tuple[int, ...]] = []
    for batch in batches:
        found += [tuple(map(int, concept)) for concept in batch.concepts[:, 1:][batch.target_mask].tolist()]
        assert batch.targets == int(batch.target_mask.sum())
    assert len(found) == len(set(found))
    return set(found)  # type: ignore[arg-type]


def expected_targets(parts: list[tuple[int, int]], longest: int) -> set[tuple[int, int]]:
    """Those in the target parts of documents, as far as a segment of them goes."""
    return {(i, p) for i, (known, learned) in enumerate(parts) for p in range(known, min(known + learned, longest))}


def plan_of(*datasets: Dataset, row_length: int, max_segment: int, rows: int = 2, epochs: int | None = 1) -> Plan:
    return Plan([source_of(each, row_length, max_segment) for each in datasets], 5, rows, row_length, epochs)


def test_the_json_of_a_document_has_both_parts_and_readers_see_all_sentences(make: Callable[..., Dataset]) -> None:
    dataset = make(PARTS)
    shard = open_shard(dataset, 0)
    stored = json.loads(shard.members(0)["json"])
    assert set(stored) == {"id", "source", "source_sentences", "target_sentences"}
    assert [len(stored[part]) for part in ("source_sentences", "target_sentences")] == [3, 2]
    assert shard.meta(0)["sentences"] == [f"Sentence {position} of 0." for position in range(5)]
    assert shard.given.tolist() == [known for known, _ in PARTS[:3]]
    assert [errors for errors in verify(dataset) if errors] == []


def test_targets_are_the_target_part_alone_its_first_concept_included(make: Callable[..., Dataset]) -> None:
    dataset = make(PARTS)
    total = sum(map(sum, PARTS))
    batches = list(validation_batches(dataset, total, total, 1, 0, 1))
    assert targets(batches) == expected_targets(PARTS, total)


def test_what_is_behind_the_first_segment_has_lost_its_source_and_is_no_target(make: Callable[..., Dataset]) -> None:
    dataset = make(PARTS)
    for row_length, max_segment in ((7, 7), (12, 4), (7, 12)):
        batches = list(validation_batches(dataset, row_length, max_segment, 2, 0, 1))
        assert targets(batches) == expected_targets(PARTS, min(row_length, max_segment))
        assert sum(batch.real_concepts for batch in batches) == sum(map(sum, PARTS))


@settings(max_examples=30)
@given(data=st.data())
def test_every_target_whose_document_fits_is_seen_once_an_epoch(
    make: Callable[..., Dataset], data: st.DataObject
) -> None:
    part = st.integers(1, 12)
    parts = data.draw(st.lists(st.tuples(part, part), min_size=1, max_size=14))
    row_length, max_segment = data.draw(st.integers(2, 30)), data.draw(st.integers(2, 30))
    dataset, longest = make(parts), min(row_length, max_segment)
    expected = expected_targets(parts, longest)
    plan = plan_of(dataset, row_length=row_length, max_segment=max_segment, rows=3, epochs=2)
    loader = Loader([dataset], plan, 0, 1, 3, workers=0)
    seen: Counter[tuple[int, ...]] = Counter()
    concepts = 0
    for batch in loader:
        seen.update(tuple(map(int, concept)) for concept in batch.concepts[:, 1:][batch.target_mask].tolist())
        concepts += batch.real_concepts
    loader.close()
    assert seen == dict.fromkeys(expected, 2)
    assert {(i, p) for i, p in expected_targets(parts, 99) if sum(parts[i]) <= longest} <= set(seen)
    assert concepts == 2 * sum(map(sum, parts))
    found = target_reach(dataset, row_length, max_segment)
    assert (found.reached, found.all) == (len(expected), sum(learned for _, learned in parts))
    assert (missing_targets(dataset, row_length, max_segment) is None) == bool(expected)
    assert targets(list(validation_batches(dataset, row_length, max_segment, 2, 0, 1))) == expected


@settings(max_examples=12)
@given(data=st.data())
def test_the_global_batch_is_the_same_for_any_world_size_micro_batch_and_workers(
    make: Callable[..., Dataset], data: st.DataObject
) -> None:
    datasets = [make(PARTS * 4), make(PARTS * 3, supervised=False)]
    plan = plan_of(*datasets, row_length=12, max_segment=7, rows=8, epochs=2)
    whole = Loader(datasets, plan, 0, 1, 8, workers=0)
    steps, start = plan.steps or 0, data.draw(st.integers(0, (plan.steps or 0) - 1))
    world_size = data.draw(st.sampled_from([1, 2, 4, 8]))
    micro = data.draw(st.sampled_from([n for n in (1, 2, 4, 8) if 8 // world_size % n == 0]))
    workers = data.draw(st.integers(0, 2))
    loaders = [Loader(datasets, plan, rank, world_size, micro, workers, start) for rank in range(world_size)]
    iterators = [iter(loader) for loader in loaders]
    for step in range(start, steps):
        expected = whole.read(step, 0)
        found = [b for each, loader in zip(iterators, loaders, strict=True) for b in islice(each, loader.micro_batches)]
        for name in ("concepts", "segment_ids", "given"):
            assert torch.equal(torch.cat([getattr(batch, name) for batch in found]), getattr(expected, name))
    for loader in loaders:
        assert next(iter(loader)).step == start
        loader.close()


def test_trace_names_what_the_loader_delivers(make: Callable[..., Dataset]) -> None:
    dataset = make(PARTS)
    plan = plan_of(dataset, row_length=12, max_segment=7)
    loader = Loader([dataset], plan, 0, 1, 2, workers=0)
    for step, lines in trace([dataset], plan, range(plan.steps or 0)):
        batch = loader.read(step, 0)
        for line in lines:
            segment = batch.concepts[line.lane][batch.segment_ids[line.lane] == line.segment].int().tolist()
            assert segment == [[int(line.key), position] for position in range(line.start, line.stop)]
        assert batch.real_concepts == sum(line.stop - line.start for line in lines)


def test_a_bad_shard_becomes_rows_without_targets(make: Callable[..., Dataset]) -> None:
    dataset = make(PARTS)
    (Path(dataset.path) / dataset.shards[0].name).unlink()
    plan = plan_of(dataset, row_length=12, max_segment=12)
    loader = Loader([replace(dataset, skip_bad=True)], plan, 0, 1, 2, workers=0)
    batches = list(loader)
    loader.close()
    assert targets(batches) == {(i, p) for i, p in expected_targets(PARTS, 12) if i >= 3}
    assert sum(batch.missing for batch in batches) == dataset.shards[0].concepts


def documents_of(dataset: Dataset) -> list[tuple[list[int], list[int]]]:
    """Concepts of each document of each shard, and how many of them are given."""
    assert dataset.index is not None
    shards = range(len(dataset.shards))
    return [(dataset.index.lengths(shard).tolist(), dataset.index.given(shard).tolist()) for shard in shards]


def test_every_way_to_make_a_supervised_dataset_indexes_what_is_given(
    make: Callable[..., Dataset], tmp_path: Path
) -> None:
    dataset = make(PARTS)
    indexed_documents = [([5, 5, 5], [3, 1, 2]), ([7, 4, 10], [6, 2, 5])]
    assert documents_of(dataset) == indexed_documents
    index(f"{dataset.path}/{{0000,0003}}.tar", tmp_path / "adopted", supervised=Supervised())
    assert documents_of(open_dataset(tmp_path / "adopted")) == indexed_documents
    assert documents_of(make(PARTS, supervised=False)) == [([5, 5, 5], [0, 0, 0]), ([7, 4, 10], [0, 0, 0])]


def test_the_index_follows_where_a_document_is_a_duplicate(make: Callable[..., Dataset], tmp_path: Path) -> None:
    dataset = make(PARTS)
    for folder in ("train", "validation", "ids"):
        (tmp_path / folder).mkdir()
    units = []
    for unit in range(2):  # the second has all the documents of the first, and one more
        shard, others = open_shard(dataset, 0), [0] if unit == 0 else [2, 0]
        commit(tmp_path / "train", copy_shard(shard, others, tmp_path / "train", f"{unit:08d}.tar"))
        units.append(UnitResult(unit, len(others), {"train": len(others), "validation": 0}))
        write_ids(tmp_path, unit, [f"text-{i}" for i in others])
        add_unit(tmp_path, units[-1])
    drop_duplicates(tmp_path, units, supervised=True)
    write_normalizer(tmp_path / "train", np.zeros(2), np.ones(2), {})
    finish(tmp_path / "train", dataset.info)
    assert documents_of(open_dataset(tmp_path / "train")) == [([5], [3]), ([5], [2])]


def test_a_dataset_of_an_earlier_version_is_indexed_when_it_is_first_used(
    make: Callable[..., Dataset], caplog: pytest.LogCaptureFixture
) -> None:
    dataset = make(PARTS)
    folder = Path(dataset.path)
    lists = [replace(s, index=None, lengths=[5] * 3, given=[1] * 3).line() + "\n" for s in dataset.shards]
    (folder / "shards.jsonl").write_text("".join(lists))
    (folder / "documents.idx").unlink()
    earlier = open_dataset(folder)
    assert earlier.index is None
    assert earlier.fingerprint == dataset.fingerprint
    assert documents_of(indexed(earlier)) == documents_of(indexed(open_dataset(folder))) == documents_of(dataset)
    (line,) = [record.getMessage() for record in caplog.records]  # made once
    assert line.startswith(f"{folder}: has no documents.idx yet")
    assert open_dataset(folder).info.index == dataset.info.index
    assert (folder / "shards.jsonl").read_text() == "".join(shard.line() + "\n" for shard in dataset.shards)


def test_a_record_that_is_not_of_the_tar_is_named(make: Callable[..., Dataset]) -> None:
    dataset, other = make(PARTS), make(PARTS[::-1])
    changed = replace(dataset, shards=(replace(dataset.shards[0], index=other.shards[0].index), *dataset.shards[1:]))
    found = [line for errors in verify(changed) for line in errors]
    assert found == [f"{dataset.path}/{dataset.shards[0].name}: its record in documents.idx is of other documents"]


def test_a_dataset_without_targets_is_named_with_why(make: Callable[..., Dataset]) -> None:
    long = make([(20, 4), (22, 3)])
    assert missing_targets(long, 32, 21) is None
    wrong = missing_targets(long, 32, 16)
    assert wrong is not None
    assert wrong.startswith(f"{long.path}: holds nothing to predict: sources have 20 concepts or more")
    assert "data.max_segment 16" in wrong
    assert "data.row_length 18" in (missing_targets(long, 18, 24) or "")
    single = make([(1, 0)] * 4, supervised=False)
    assert missing_targets(single, 32, 16) == (
        f"{single.path}: holds nothing to predict: each of its documents is a single concept"
    )
    assert missing_targets(make([(1, 0)] * 4 + [(2, 0)], supervised=False), 32, 16) is None


def test_in_a_mixture_plain_documents_are_learned_whole(make: Callable[..., Dataset]) -> None:
    plain, supervised = make([(4, 4)] * 6, supervised=False), make([(4, 4)] * 6)
    plan = plan_of(plain, supervised, row_length=48, max_segment=8)
    loader = Loader([plain, supervised], plan, 0, 1, 2, workers=0)
    (first,) = list(loader)
    loader.close()
    assert (first.target_mask.sum(1).tolist(), loader.plan.steps) == ([6 * 7, 6 * 4], 1)  # the last four of each


def test_batches_of_plain_datasets_carry_nothing_for_it(make: Callable[..., Dataset]) -> None:
    dataset = make(PARTS, supervised=False)
    for batch in validation_batches(dataset, 8, 8, 1, 0, 1):
        assert batch.given is None
        assert torch.equal(batch.target_mask, target_mask(batch.segment_ids))


def test_the_same_shards_are_another_order_of_data_when_they_are_supervised(make: Callable[..., Dataset]) -> None:
    dataset = make(PARTS)
    plain = replace(dataset, info=dataset.info.model_copy(update={"supervised": None}))
    assert plain.fingerprint != dataset.fingerprint


def test_a_document_without_one_of_its_parts_is_named(make: Callable[..., Dataset], tmp_path: Path) -> None:
    dataset = make(PARTS, supervised=False)
    wrong = replace(dataset, info=dataset.info.model_copy(update={"supervised": Supervised()}))
    with pytest.raises(InputError, match=f"{wrong.path}: has documents without a source"):
        missing_targets(wrong, 8, 8)
    both = Document("a", "a", "tests", ["One.", "Two."], np.zeros((2, 2), np.float32), given=2)
    with pytest.raises(InputError, match="a: has 2 source_sentences and 0 target_sentences"):
        write_shard(tmp_path, "a.tar", [both])
    assert list(tmp_path.iterdir()) == []
