"""Supervised documents: what is given is never a target, and the sentences of both parts are those of the concepts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lcm_ds.data.format import Dataset, DatasetInfo, Supervised, commit, finish, open_dataset, write_normalizer
from lcm_ds.data.loader import Loader, target_mask, validation_batches
from lcm_ds.data.plan import Plan, Source
from lcm_ds.data.reader import open_shard, verify
from lcm_ds.data.writer import Document, write_shard
from lcm_ds.errors import InputError

PARTS = [(3, 2), (1, 4), (2, 3), (6, 1), (2, 2), (5, 5)]  # concepts of each document's source and target


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Dataset]:
    """make(parts, supervised=True): a dataset whose concepts say which document and position they are."""

    def make(parts: list[tuple[int, int]], supervised: bool = True) -> Dataset:
        folder = tmp_path_factory.mktemp("supervised")
        documents = []
        for i, (given, learned) in enumerate(parts):
            n = given + learned
            concepts = np.stack([np.full(n, i), np.arange(n)], axis=1).astype(np.float32)
            sentences = [f"Sentence {position} of {i}." for position in range(n)]
            part = given if supervised else None
            documents.append(Document(f"{i:04d}", f"text-{i}", "tests", sentences, concepts, part))
        for shard in range(0, len(documents), 3):
            commit(folder, write_shard(folder, f"{shard:04d}.tar", documents[shard : shard + 3]))
        write_normalizer(folder, np.zeros(2), np.ones(2), {})
        said = Supervised(source_suffix="[MODEL]:") if supervised else None
        finish(folder, DatasetInfo(encoder={"name": "tests"}, embed_dim=2, dtype="float16", supervised=said))
        return open_dataset(folder)

    return make


def targets(batches: list, row_length: int) -> set[tuple[int, int]]:
    """Document and position of every target of some batches, told from the concepts."""
    found = []
    for batch in batches:
        found += [tuple(map(int, concept)) for concept in batch.concepts[:, 1:][batch.target_mask].tolist()]
        assert batch.targets == int(batch.target_mask.sum())
    assert len(found) == len(set(found))
    return set(found)


def test_the_json_of_a_document_has_both_parts_and_readers_see_all_sentences(make: Callable[..., Dataset]) -> None:
    dataset = make(PARTS)
    shard = open_shard(dataset, 0)
    stored = json.loads(shard.members(0)["json"])
    assert set(stored) == {"id", "source", "source_sentences", "target_sentences"}
    assert [len(stored[part]) for part in ("source_sentences", "target_sentences")] == [3, 2]
    assert shard.meta(0)["sentences"] == [f"Sentence {position} of 0." for position in range(5)]
    assert shard.given.tolist() == [given for given, _ in PARTS[:3]]
    assert [mistakes for mistakes in verify(dataset) if mistakes] == []


def test_targets_are_the_target_part_alone_its_first_concept_included(make: Callable[..., Dataset]) -> None:
    dataset = make(PARTS)
    total = sum(map(sum, PARTS))
    batches = list(validation_batches(dataset, total, total, 1, 0, 1))
    expected = {(i, p) for i, (given, learned) in enumerate(PARTS) for p in range(given, given + learned)}
    assert targets(batches, total) == expected


def test_what_has_lost_its_source_at_the_end_of_a_row_or_segment_is_no_target(make: Callable[..., Dataset]) -> None:
    dataset = make(PARTS)
    for row_length, max_segment in ((7, 7), (12, 4)):
        batches = list(validation_batches(dataset, row_length, max_segment, 2, 0, 1))
        expected = set()
        for batch in batches:
            for row, ids in zip(batch.concepts, batch.segment_ids, strict=True):
                for number in range(int(ids.max()) + 1):
                    segment = row[ids == number].int().tolist()
                    given = PARTS[segment[0][0]][0]
                    if segment[0][1] == 0:
                        expected |= {(i, position) for i, position in segment[1:] if position >= given}
        assert targets(batches, row_length) == expected
        assert expected


def test_in_a_mixture_plain_documents_are_learned_whole(make: Callable[..., Dataset]) -> None:
    plain, supervised = make([(4, 4)] * 6, supervised=False), make([(4, 4)] * 6)
    sources = [Source([shard.concepts for shard in dataset.shards]) for dataset in (plain, supervised)]
    plan = Plan(sources, 0, 2, 48, epochs=1)
    loader = Loader([plain, supervised], plan, 8, 0, 1, 2, workers=0)
    (batch,) = list(loader)
    loader.close()
    counts = batch.target_mask.sum(1).tolist()
    assert counts == [6 * 7, 6 * 4]  # all but the first of each; the last four of each


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
    with pytest.raises(InputError, match=r"000\d: has 0 sentences and \d concepts"):
        next(iter(validation_batches(wrong, 8, 8, 1, 0, 1)))
    both = Document("a", "a", "tests", ["One.", "Two."], np.zeros((2, 2), np.float32), given=2)
    folder = tmp_path / "lonely"
    folder.mkdir()
    commit(folder, write_shard(folder, "a.tar", [both]))
    write_normalizer(folder, np.zeros(2), np.ones(2), {})
    finish(folder, DatasetInfo(encoder={"name": "tests"}, embed_dim=2, dtype="float16", supervised=Supervised()))
    with pytest.raises(InputError, match="a: has 2 source_sentences and 0 target_sentences"):
        open_shard(open_dataset(folder), 0).given  # noqa: B018
