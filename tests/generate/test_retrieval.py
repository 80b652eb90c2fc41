"""The search for the nearest sentence: exact, over all shards, whatever the block size."""

import shutil

import numpy as np
import pytest

import lcm_ds.generate.retrieval as module
from lcm_ds.data.format import open_dataset
from lcm_ds.data.shard import open_shard
from lcm_ds.errors import InputError
from lcm_ds.generate.retrieval import nearest_sentences


def everything(datasets):
    """Concepts, sentences and ids of datasets, one after the other."""
    concepts, sentences, ids = [], [], []
    for dataset in datasets:
        for index in range(len(dataset.shards)):
            shard = open_shard(dataset, index)
            for document in range(len(shard)):
                meta = shard.meta(document)
                concepts.append(shard.concepts(document).astype(np.float32))
                sentences += meta["sentences"]
                ids += [meta["id"]] * len(meta["sentences"])
    return np.concatenate(concepts), sentences, ids


@pytest.fixture
def datasets(synthetic_dataset):
    return [open_dataset(synthetic_dataset(seed=seed)) for seed in (1, 2)]


@pytest.mark.parametrize("block", [1, 7, 65_536])
def test_it_is_the_best_of_all_concepts_whatever_the_block(datasets, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    concepts, sentences, ids = everything(datasets)
    queries = np.random.default_rng(0).normal(size=(20, 16)).astype(np.float32)
    cosines = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ (
        concepts / np.linalg.norm(concepts, axis=1, keepdims=True)
    ).T
    found = nearest_sentences(queries, datasets)
    for query, one in enumerate(found):
        best = cosines[query].argmax()
        assert one.cosine == pytest.approx(cosines[query, best], abs=1e-6)
        assert one.text == sentences[best]
        assert one.document == ids[best]
    assert {one.document.split("-")[1] for one in found} == {"1", "2"}, "both datasets are looked through"


def test_a_concept_of_the_dataset_finds_its_own_sentence(datasets):
    concepts, sentences, ids = everything(datasets)
    for place in (0, 17, len(concepts) - 2):
        (found,) = nearest_sentences(3 * concepts[place : place + 1], datasets)
        assert found.cosine == pytest.approx(1, abs=1e-5)
        assert (found.text, found.document) == (sentences[place], ids[place])


def test_the_search_ends_at_its_limit(datasets):
    concepts, _, ids = everything(datasets)
    last = concepts[-2:-1]
    assert nearest_sentences(last, datasets)[0].document == ids[-1]
    (found,) = nearest_sentences(last, datasets, limit=1)
    first_shard = open_shard(datasets[0], 0)
    assert found.document in {first_shard.meta(i)["id"] for i in range(len(first_shard))}


def test_a_concept_without_a_direction_is_near_to_nothing(datasets):
    (found,) = nearest_sentences(np.zeros((1, 16), np.float32), datasets)
    assert found.cosine == 0


def test_a_shard_that_cannot_be_read_is_left_out_where_its_dataset_says_so(datasets, tmp_path):
    copy = shutil.copytree(datasets[0].path, tmp_path / "copy")
    (copy / datasets[0].shards[0].name).write_bytes(b"no tar")
    query = open_shard(datasets[0], 0).concepts(0, 0, 1).astype(np.float32)
    (found,) = nearest_sentences(query, [open_dataset(copy, skip_bad=True)])
    (full,) = nearest_sentences(query, datasets[:1])
    assert found.cosine < full.cosine == pytest.approx(1)
    with pytest.raises(InputError, match=datasets[0].shards[0].name):
        nearest_sentences(query, [open_dataset(copy, sizes=False)])
