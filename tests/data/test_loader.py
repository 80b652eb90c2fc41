"""Contract 2: the same global batch, in the same order, however many ranks, micro-batches and threads there are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import patience

from lcm_ds.data import buffers
from lcm_ds.data.batch import Batch
from lcm_ds.data.format import Dataset, DatasetInfo, commit, finish, open_dataset, write_normalizer
from lcm_ds.data.index.first_use import indexed
from lcm_ds.data.loader import Loader, validation_batches
from lcm_ds.data.open_shards import MAX_OPEN
from lcm_ds.data.plan import Plan
from lcm_ds.data.remote.cache import Cache
from lcm_ds.data.shard import open_shard
from lcm_ds.data.supervised import source_of
from lcm_ds.data.tar import read_members
from lcm_ds.data.trace import trace
from lcm_ds.data.writer import Document, write_shard
from lcm_ds.errors import InputError
from lcm_ds.files import OpenFile

ROWS, LENGTH, MAX_SEGMENT = 24, 32, 16


@pytest.fixture(scope="module")
def dataset(synthetic_dataset: Callable[..., Path]) -> Dataset:
    """13 shards, 129 documents, about 3000 concepts: an epoch is 4 steps and a bit."""
    return open_dataset(synthetic_dataset(documents=129, documents_per_shard=10, embed_dim=4, lengths=(2, 45)))


@pytest.fixture(scope="module")
def make_shards(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Dataset]:
    """make_shards([[3, 5], [2]]) -> a dataset of two shards with documents of so many concepts."""

    def make(shards: list[list[int]]) -> Dataset:
        folder, random = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
        for number, lengths in enumerate(shards):
            documents = [
                Document(f"{i:04d}", f"{number}-{i}", "tests", ["A sentence."] * n, random.normal(size=(n, 2)))
                for i, n in enumerate(lengths)
            ]
            commit(folder, write_shard(folder, f"{number:04d}.tar", documents))
        write_normalizer(folder, np.zeros(2), np.ones(2), {})
        finish(folder, DatasetInfo(encoder={"name": "tests"}, embed_dim=2, dtype="float16"))
        return open_dataset(folder)

    return make


def plan_of(
    *datasets: Dataset,
    epochs: int | None = None,
    rows: int = ROWS,
    length: int = LENGTH,
    max_segment: int = MAX_SEGMENT,
) -> Plan:
    return Plan([source_of(each, length, max_segment) for each in datasets], 11, rows, length, epochs)


def load(dataset: Dataset, plan: Plan, steps: range, world_size: int, micro: int, workers: int) -> Iterator[Batch]:
    """All ranks' batches of `steps`, in order of step, rank and micro-batch: the global batch from its first row on."""
    loaders = [Loader([dataset], plan, rank, world_size, micro, workers, steps.start) for rank in range(world_size)]
    iterators = [iter(loader) for loader in loaders]
    for step in steps:
        for loader, iterator in zip(loaders, iterators, strict=True):
            for index, batch in enumerate(islice(iterator, loader.micro_batches)):
                assert (batch.step, batch.index) == (step, index)
                yield batch
    for loader in loaders:
        loader.close()


def joined(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of batches, put where their lanes say."""
    by_lane = sorted(batches, key=lambda batch: (batch.step, batch.first_lane))
    return torch.cat([b.concepts for b in by_lane]), torch.cat([b.segment_ids for b in by_lane])


@pytest.fixture(scope="module")
def reference(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """The first 7 steps, read on one rank in one micro-batch without threads."""
    return joined(list(load(dataset, plan_of(dataset), range(7), 1, ROWS, 0)))


@settings(max_examples=60)
@given(data=st.data())
def test_the_global_batch_is_the_same_for_any_world_size_micro_batch_and_workers(
    dataset: Dataset, reference: tuple[torch.Tensor, torch.Tensor], data: st.DataObject
) -> None:
    world_size = data.draw(st.sampled_from([n for n in range(1, 9) if ROWS % n == 0]))
    lanes = ROWS // world_size
    micro = data.draw(st.sampled_from([n for n in range(1, lanes + 1) if lanes % n == 0]))
    workers, start = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 6))
    batches = list(load(dataset, plan_of(dataset), range(start, 7), world_size, micro, workers))
    # In this order the rows already lie as they do in the global batch.
    assert [batch.first_lane for batch in batches] == list(range(0, ROWS, micro)) * (7 - start)
    for found, expected in zip(joined(batches), reference, strict=True):
        assert torch.equal(found, expected[start * ROWS :])


@settings(max_examples=25)
@given(data=st.data())
def test_so_it_is_for_any_shards_and_up_to_64_ranks(make_shards: Callable[..., Dataset], data: st.DataObject) -> None:
    lengths = st.lists(st.integers(1, 40), max_size=8)
    shards = data.draw(st.lists(lengths, min_size=1, max_size=12).filter(any))
    dataset = make_shards(shards)
    rows, steps = 64 * data.draw(st.integers(1, 2)), 3
    world_size = data.draw(st.sampled_from([n for n in range(1, 65) if rows % n == 0]))
    micro = data.draw(st.sampled_from([n for n in range(1, rows + 1) if rows // world_size % n == 0]))
    start, epochs = data.draw(st.integers(0, steps - 1)), data.draw(st.sampled_from([None, 40]))
    workers = data.draw(st.integers(0, 2))
    plan = plan_of(dataset, epochs=epochs, rows=rows, length=8, max_segment=6)
    expected = joined([Loader([dataset], plan, 0, 1, rows, workers=0).read(step, 0) for step in range(steps)])
    loaders = [Loader([dataset], plan, rank, world_size, micro, workers, start) for rank in range(world_size)]
    found = [list(islice(loader, (steps - start) * loader.micro_batches)) for loader in loaders]
    for loader in loaders:
        loader.close()
    last = min(steps, plan.steps or steps)
    for batch, whole in zip(joined([batch for some in found for batch in some]), expected, strict=True):
        assert torch.equal(batch, whole[start * rows : last * rows])


def test_each_concept_is_read_once_an_epoch_and_the_last_step_is_filled_up(dataset: Dataset) -> None:
    plan = plan_of(dataset, epochs=3)
    loader = Loader([dataset], plan, 0, 1, 4)
    read: Counter[bytes] = Counter()
    steps, empty = set(), 0
    for batch in loader:
        steps.add(batch.step)
        empty += int((batch.segment_ids < 0).all(dim=1).sum())
        read.update(concept.numpy().tobytes() for concept in batch.concepts[batch.segment_ids >= 0])
    loader.close()
    stored: Counter[bytes] = Counter()
    for index in range(len(dataset.shards)):
        shard = open_shard(dataset, index)
        stored.update(concept.tobytes() for i in range(len(shard)) for concept in shard.concepts(i))
    assert read == Counter({concept: 3 * times for concept, times in stored.items()})
    assert steps == set(range(plan.steps or 0))
    assert empty > 0  # rows behind the last concept, in the last step
    assert empty == ROWS * len(steps) - -(-3 * dataset.info.totals.concepts // LENGTH)


def test_documents_have_another_order_in_each_epoch(synthetic_dataset: Callable[..., Path]) -> None:
    dataset = open_dataset(synthetic_dataset(documents=10, documents_per_shard=10))
    total = dataset.info.totals.concepts
    plan = plan_of(dataset, rows=1, length=total)  # a step is an epoch
    orders = [[(line.id, line.start) for line in lines] for _, lines in trace([dataset], plan, range(3))]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert len({tuple(order) for order in orders}) == 3


def test_rows_are_segments_numbered_from_0_and_then_padding(dataset: Dataset) -> None:
    plan = plan_of(dataset, epochs=1)
    loader = Loader([dataset], plan, 0, 1, ROWS, workers=0)
    for batch in loader:
        targets = 0
        assert batch.concepts.shape == (ROWS, LENGTH, 4)
        assert (batch.concepts.dtype, batch.segment_ids.dtype) == (torch.float16, torch.int32)
        for concepts, ids in zip(batch.concepts, batch.segment_ids.tolist(), strict=True):
            real = [i for i in ids if i >= 0]
            assert ids == real + [-1] * (LENGTH - len(real))
            lengths = Counter(real)
            assert real == sorted(real)
            assert sorted(lengths) == list(range(len(lengths)))
            assert max(lengths.values(), default=0) <= MAX_SEGMENT
            assert not concepts[len(real) :].any()
            targets += len(real) - len(lengths)
        assert batch.targets == targets
        assert batch.real_concepts == int((batch.segment_ids >= 0).sum())


def test_trace_names_what_the_loader_delivers(dataset: Dataset) -> None:
    plan = plan_of(dataset)
    batch = Loader([dataset], plan, 0, 1, ROWS, workers=0).read(5, 0)
    shards = {shard.name: open_shard(dataset, i) for i, shard in enumerate(dataset.shards)}
    filled = dict.fromkeys(range(ROWS), 0)
    ((step, lines),) = trace([dataset], plan, range(5, 6))
    assert step == 5
    for line in lines:
        shard, first = shards[line.shard], filled[line.lane]
        document = shard.keys.index(line.key)
        last = filled[line.lane] = first + line.stop - line.start
        assert set(batch.segment_ids[line.lane, first:last].tolist()) == {line.segment}
        expected = torch.from_numpy(shard.concepts(document)[line.start : line.stop].copy())
        assert torch.equal(batch.concepts[line.lane, first:last], expected)
        meta = shard.meta(document)
        assert line.id == meta["id"]
        assert list(line.sentences) == meta["sentences"][line.start : line.stop]
        assert line.sentences
    assert set(filled.values()) == {LENGTH}


def test_trace_leaves_out_few_bad_shards_of_many(synthetic_dataset: Callable[..., Path], tmp_path: Path) -> None:
    made = synthetic_dataset(documents=80, documents_per_shard=1, embed_dim=4)
    folder = Path(shutil.copytree(made, tmp_path / "dataset"))
    dataset = open_dataset(folder, skip_bad=True)
    for index in (5, 30):
        (folder / dataset.shards[index].name).unlink()
    plan = plan_of(dataset, epochs=1, rows=4)
    assert plan.steps is not None
    found = {line.shard for _, lines in trace([dataset], plan, range(plan.steps)) for line in lines}
    assert found == {shard.name for index, shard in enumerate(dataset.shards) if index not in (5, 30)}


def test_a_mixture_reads_each_dataset_in_its_lanes(dataset: Dataset, synthetic_dataset: Callable[..., Path]) -> None:
    other = open_dataset(synthetic_dataset(documents=30, embed_dim=4, seed=1, dtype="float32"))
    plan = plan_of(dataset, other)
    datasets = [dataset, other]
    batch = Loader(datasets, plan, 0, 1, ROWS, workers=0).read(0, 0)
    assert batch.concepts.dtype == torch.float32  # the wider of the two
    ((_, lines),) = trace(datasets, plan, range(1))
    ids = {line.lane: line.id for line in lines}
    assert all(name.startswith(f"text-{int(lane >= ROWS // 2)}-") for lane, name in ids.items())


def test_rows_that_cannot_be_shared_out_are_refused(dataset: Dataset) -> None:
    with pytest.raises(InputError, match="24 is not a multiple of 5 ranks × 2 micro_batch_rows"):
        Loader([dataset], plan_of(dataset), 0, 5, 2)


# --- threads ---


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("lcm-ds-loader")]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_comes_where_its_batch_would_have_and_names_the_shard(own_dataset: Path, workers: int) -> None:
    dataset = open_dataset(own_dataset)
    plan = plan_of(dataset, rows=1, length=16)
    order = [int(shard) for step in range(len(dataset.shards) * 10) for shard in plan.segments(step, range(1)).shard]
    missing = max(range(len(dataset.shards)), key=order.index)  # the one that is read last
    (own_dataset / dataset.shards[missing].name).unlink()
    loader = Loader([dataset], plan, 0, 1, 1, workers)
    batches = iter(loader)
    first = next(s for s in range(100) if missing in plan.segments(s, range(1)).shard)
    assert [batch.step for batch in islice(batches, first)] == list(range(first))
    assert first > 0
    with pytest.raises(InputError, match=f"{dataset.shards[missing].name}: cannot be read: No such file"):
        next(batches)
    loader.close()
    assert loader_threads() == []


class Counting(Loader):
    """Keeps which micro-batches were read."""

    def read(self, step: int, index: int) -> Batch:
        self.__dict__.setdefault("reads", []).append((step, index))
        return super().read(step, index)


def test_threads_read_a_whole_step_ahead(dataset: Dataset) -> None:
    loader = Counting([dataset], plan_of(dataset), 0, 1, 2, workers=1)
    assert loader.micro_batches == 12
    batches = iter(loader)
    for _ in range(12):
        next(batches)
    deadline = time.monotonic() + patience(10)
    while len(loader.reads) < 24 and time.monotonic() < deadline:
        time.sleep(0.01)
    loader.close()
    assert loader.reads == [(step, index) for step in range(2) for index in range(12)]


def test_the_next_block_is_laid_out_before_it_is_read(dataset: Dataset) -> None:
    source = replace(source_of(dataset, LENGTH, MAX_SEGMENT), shuffle_shards=5)
    laid_out: list[str] = []

    def lengths(shard: int) -> np.ndarray:
        laid_out.append(threading.current_thread().name)
        return source.lengths(shard)

    plan = Plan([replace(source, lengths=lengths)], 11, 4, LENGTH, 1)
    loader = Loader([dataset], plan, 0, 1, 4, workers=0)
    first, second = plan.blocks(0, range(4))
    next(iter(loader))
    loader._prefetcher._pool.shutdown(wait=True)
    assert sum(thread.startswith("lcm-ds-prefetch") for thread in laid_out) >= len(plan.shards(second)[1])
    assert len(laid_out) == len(plan.shards(first)[1]) + len(plan.shards(second)[1])  # each once
    loader.close()


def test_threads_end_in_the_middle_and_read_no_further_ahead_than_needed(dataset: Dataset) -> None:
    loader = Counting([dataset], plan_of(dataset), 0, 1, 4, workers=2)
    next(iter(loader))
    deadline = time.monotonic() + patience(10)
    while len(loader.reads) < 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(loader.reads) == 7  # the one that was taken, and two a worker and two more ahead of it
    assert loader_threads()
    loader.close()
    assert loader_threads() == []


def test_shards_open_at_a_time_are_few_and_stay_open_for_the_next_batch(
    synthetic_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenFile, "read_cached", OpenFile.read_into)  # on any file system
    opened, open_file = [], Dataset.open_file  # how many were open before each

    def counted(*arguments) -> OpenFile:
        opened.append(len(os.listdir("/proc/self/fd")) - before)
        return open_file(*arguments)

    monkeypatch.setattr(Dataset, "open_file", counted)
    shards = MAX_OPEN * 5 // 4
    dataset = open_dataset(synthetic_dataset(documents=shards, documents_per_shard=1, embed_dim=4))
    before, epochs = len(os.listdir("/proc/self/fd")), 50
    loader = Loader([dataset], plan_of(dataset, epochs=epochs, rows=64), 0, 1, 64, workers=0)  # a batch: most shards
    most = max(len(os.listdir("/proc/self/fd")) - before for _ in loader)
    assert MAX_OPEN / 2 < most <= MAX_OPEN + 2
    assert max(opened) < most  # one is closed before the next is opened
    # Few readings open a file. It would be two thirds of them if the least recently used file were closed.
    assert len(opened) < 0.4 * epochs * shards


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_not_in_memory_is_fetched_in_one_go(
    synthetic_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    dataset = open_dataset(synthetic_dataset(documents=60, documents_per_shard=7, embed_dim=4, dtype=dtype))

    def read() -> list[Batch]:
        return list(Loader([dataset], plan_of(dataset, epochs=1), 0, 1, 8, workers=0))

    expected = read()
    events: list[str] = []
    read_into = OpenFile.read_into
    monkeypatch.setattr(OpenFile, "read_cached", lambda *_: events.append("?"))
    monkeypatch.setattr(OpenFile, "fetch", lambda *_: events.append("fetch"))
    monkeypatch.setattr(OpenFile, "read_into", lambda *args: events.append("read") or read_into(*args))
    for batch, same in zip(Loader([dataset], plan_of(dataset, epochs=1), 0, 1, 8, workers=0), expected, strict=True):
        assert torch.equal(batch.concepts, same.concepts)
        reads = sum(int(row.max()) + 1 for row in batch.segment_ids)
        assert events == (["?"] + (reads - 1) * ["fetch"] + reads * ["read"] if reads else [])
        events.clear()


FEW_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (100, int(sys.argv[2])))
from lcm_ds.data.format import open_dataset
from lcm_ds.data.loader import Loader
from lcm_ds.data.plan import Plan
from lcm_ds.data.supervised import source_of
from lcm_ds.errors import InputError
dataset = open_dataset(sys.argv[1])
plan = Plan([source_of(dataset, 4, 16)], 0, 150, 4, 1)
try:
    print(sum(batch.real_concepts for batch in Loader([dataset], plan, 0, 1, 150, 0)))
except InputError as error:
    print(error)
"""


def test_as_few_files_as_shards_may_be_open_are_refused(synthetic_dataset: Callable[..., Path]) -> None:
    folder = synthetic_dataset(documents=160, documents_per_shard=1, embed_dim=4)

    def read(hard: int) -> str:
        call = [sys.executable, "-c", FEW_FILES, str(folder), str(hard)]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    assert read(4096) == str(open_dataset(folder).info.totals.concepts)
    assert read(120).startswith("ulimit -n: this process may open 120 files; it has up to 64 shards open at a time")


@pytest.mark.slow
def test_memory_does_not_grow_with_epochs(synthetic_dataset: Callable[..., Path]) -> None:
    dataset = open_dataset(synthetic_dataset(documents=1500, documents_per_shard=100, embed_dim=4))
    plan = plan_of(dataset, epochs=66, rows=16, length=256)
    loader = Loader([dataset], plan, 0, 1, 16, workers=2)
    held: dict[bool, list[int]] = {False: [], True: []}  # early and late
    for batch in loader:
        epoch = plan.epoch(batch.step)
        if epoch >= 4 and not tracemalloc.is_tracing():
            tracemalloc.start()
        if 16 <= epoch < 32 or epoch >= 50:
            held[epoch >= 50].append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    loader.close()
    # The order of an epoch takes over 8 bytes a document. How many orders there are at a moment depends on the threads
    # (from one to three, with what laying them out takes), so many moments are compared; 34 epochs lie between them.
    assert median(held[True]) - median(held[False]) < 34 * 1500 * 8 / 2


# --- buffers ---


def test_a_batch_keeps_its_numbers_as_long_as_anybody_has_a_part_of_it(dataset: Dataset) -> None:
    loader = Loader([dataset], plan_of(dataset), 0, 1, ROWS, workers=2)
    batches = iter(loader)
    kept = [next(batches).concepts[3, 1:] for _ in range(4)]
    copies = [part.clone() for part in kept]
    places = {next(batches).concepts.data_ptr() for _ in range(40)}
    loader.close()
    assert len(places) < 12  # those that nobody has any more come again
    assert all(torch.equal(part, copy) for part, copy in zip(kept, copies, strict=True))


def test_a_batch_needs_no_huge_pages(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers.mmap, "MADV_HUGEPAGE", 12345)  # which no kernel knows: EINVAL
    assert buffers.Buffers((2, 3), torch.float16).take().shape == (2, 3)


# --- shards that cannot be read ---


def damage(folder: Path, dataset: Dataset, index: int, how: str) -> None:
    path = folder / dataset.shards[index].name
    if how == "missing":
        path.unlink()
        return
    shard = open_shard(dataset, index)
    data = bytearray(path.read_bytes())
    data[shard.offsets[len(shard) // 2] + 3] ^= 1  # in the first concept of the document in the middle
    path.write_bytes(data if how == "a flipped bit" else data[: shard.offsets[len(shard) // 2] + 3])


def bad_concepts(dataset: Dataset, index: int, how: str) -> int:
    """How many concepts of a damaged shard cannot be read."""
    assert dataset.index is not None
    lengths = dataset.index.lengths(index).tolist()
    middle = len(lengths) // 2
    return {"missing": sum(lengths), "a flipped bit": lengths[middle], "cut off": sum(lengths[middle:])}[how]


@pytest.mark.parametrize("how", ["missing", "a flipped bit", "cut off"])
def test_what_is_bad_is_left_out_where_the_config_says_so(
    own_dataset: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = open_dataset(own_dataset)
    plan = plan_of(dataset, epochs=2, rows=3, length=16)
    whole = list(Loader([dataset], plan, 0, 1, 3))
    bad = 2
    damage(own_dataset, dataset, bad, how)
    with pytest.raises(InputError, match=dataset.shards[bad].name):
        list(Loader([dataset], plan, 0, 1, 3))
    left = list(Loader([replace(dataset, skip_bad=True)], plan, 0, 1, 3, workers=2))
    assert [(batch.step, batch.index) for batch in left] == [(batch.step, batch.index) for batch in whole]
    for found, expected in zip(left, whole, strict=True):
        gone = (found.segment_ids < 0) & (expected.segment_ids >= 0)
        assert not found.concepts[gone].any()
        assert torch.equal(found.concepts[~gone], expected.concepts[~gone])
        assert int(gone.sum()) == found.missing
        assert found.targets <= expected.targets
    assert sum(batch.missing for batch in left) == 2 * bad_concepts(dataset, bad, how)
    (line,) = {record.getMessage() for record in caplog.records}
    assert line.startswith("skipped: ")
    assert dataset.shards[bad].name in line


def test_a_changed_document_is_named_by_its_key_in_any_epoch(own_dataset: Path) -> None:
    dataset = open_dataset(own_dataset)
    loader = Loader([dataset], plan_of(dataset, epochs=2, rows=3, length=16), 0, 1, 3, workers=0)
    batches = iter(loader)
    while next(batches).step < loader.plan.steps // 2:  # type: ignore[operator]
        pass
    key = open_shard(dataset, 1).keys[len(open_shard(dataset, 1)) // 2]
    damage(own_dataset, dataset, 1, "a flipped bit")
    with pytest.raises(InputError, match=f"{dataset.shards[1].name}: {key}: has another checksum than documents.idx"):
        list(batches)


def test_more_than_a_few_bad_shards_stop_the_run_all_the_same(own_dataset: Path) -> None:
    dataset = open_dataset(own_dataset, skip_bad=True)
    plan = plan_of(dataset, epochs=1, rows=1, length=16)
    damage(own_dataset, dataset, 0, "missing")
    damage(own_dataset, dataset, 3, "cut off")
    with pytest.raises(InputError, match=r"2 of \d shards could not be read: too many to skip"):
        list(Loader([dataset], plan, 0, 1, 1))


def test_a_disk_that_fails_under_a_checksum_is_a_bad_shard(own_dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = open_dataset(own_dataset, skip_bad=True)
    bad = own_dataset / dataset.shards[1].name
    bad.unlink()
    bad.symlink_to("/proc/self/mem")  # reading its first byte is an I/O error
    batches = list(Loader([dataset], plan_of(dataset, epochs=1, rows=2, length=16), 0, 1, 2))
    assert sum(batch.missing for batch in batches) == dataset.shards[1].concepts
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"skipped: {bad}: cannot be read: Input/output error"


def test_what_cannot_be_read_of_an_open_shard_is_left_out_too(own_dataset: Path) -> None:
    dataset = open_dataset(own_dataset, checksums=False, skip_bad=True)
    plan = plan_of(dataset, epochs=1, rows=1, length=16)
    whole = list(Loader([dataset], plan, 0, 1, 1, workers=0))
    loader = Loader([dataset], plan, 0, 1, 1, workers=0)
    left = [loader.read(0, 0)]
    bad = int(plan.segments(0, range(1)).shard[0])
    os.truncate(own_dataset / dataset.shards[bad].name, 1024)
    left += [loader.read(step, 0) for step in range(1, len(whole))]
    assert 0 < sum(batch.missing for batch in left) <= dataset.shards[bad].concepts
    for found, expected in zip(left, whole, strict=True):
        gone = (found.segment_ids < 0) & (expected.segment_ids >= 0)
        assert int(gone.sum()) == found.missing
        assert not found.concepts[gone].any()
        assert torch.equal(found.concepts[~gone], expected.concepts[~gone])
    loader = Loader([replace(dataset, skip_bad=False)], plan, 0, 1, 1, workers=0)
    with pytest.raises(InputError, match=dataset.shards[bad].name):
        list(loader)


def test_validation_leaves_out_a_bad_shard_too(own_dataset: Path) -> None:
    dataset = open_dataset(own_dataset, skip_bad=True)
    damage(own_dataset, dataset, 2, "a flipped bit")
    batches = [batch for rank in validation_rows(dataset, 3, 2, None) for batch in rank]
    bad = bad_concepts(dataset, 2, "a flipped bit")
    assert sum(batch.missing for batch in batches) == bad
    assert sum(batch.real_concepts for batch in batches) == dataset.info.totals.concepts - bad
    with pytest.raises(InputError, match=dataset.shards[2].name):
        validation_rows(replace(dataset, skip_bad=False), 3, 2, None)


def test_the_size_alone_is_compared_where_the_config_says_so(own_dataset: Path) -> None:
    dataset = open_dataset(own_dataset, checksums=False)
    path = own_dataset / dataset.shards[0].name
    data = bytearray(path.read_bytes())
    members = read_members(bytes(data), "here")
    first = next(at for at, name in enumerate(members.names) if name.endswith(".npy"))
    data[members.offsets[first] + members.sizes[first] - 1] ^= 1  # in a concept
    path.write_bytes(data)
    plan = plan_of(dataset, epochs=1, rows=2, length=16)
    for workers in (0, 2):
        loader = Loader([dataset], plan, 0, 1, 2, workers)
        assert sum(batch.real_concepts for batch in loader) == dataset.info.totals.concepts
        loader.close()
    path.write_bytes(data[:-512])
    with pytest.raises(InputError, match=rf"{path.name}: has \d+ bytes, shards.jsonl lists {len(data)}"):
        open_dataset(own_dataset, checksums=False)


# --- elsewhere ---


def test_shards_elsewhere_without_a_cache_are_refused_whatever_else_is_left_out(own_dataset: Path) -> None:
    with pytest.raises(InputError, match=r"has shards that are not on this machine: data\.cache_dir has to name"):
        open_dataset(f"file://{own_dataset}", skip_bad=True)


def test_a_bad_shard_elsewhere_is_left_out_where_the_config_says_so(own_dataset: Path, tmp_path: Path) -> None:
    there = indexed(open_dataset(f"file://{own_dataset}", Cache(str(tmp_path / "cache")), skip_bad=True))
    damage(own_dataset, there, 1, "missing")
    loader = Loader([there], plan_of(there, epochs=1, rows=2, length=16), 0, 1, 2, workers=2)
    batches = list(loader)
    loader.close()
    assert sum(batch.missing for batch in batches) == there.shards[1].concepts
    assert sum(batch.real_concepts for batch in batches) == there.info.totals.concepts - there.shards[1].concepts


def test_the_shards_of_two_blocks_are_fetched_before_they_are_read(dataset: Dataset, tmp_path: Path) -> None:
    there = indexed(open_dataset(f"file://{dataset.path}", Cache(str(tmp_path))))
    source = source_of(there, LENGTH, MAX_SEGMENT, shuffle_shards=3)
    plan = Plan([source], 11, 4, LENGTH)
    loader = Loader([there], plan, 0, 1, 4, workers=0)
    next(iter(loader))  # reads from one block
    loader._prefetcher._pool.shutdown(wait=True)
    wanted = [shard for block in plan.blocks(0, range(4)) for shard in plan.shards(block)[1].tolist()]
    assert 4 <= len(set(wanted)) == len(wanted) <= 6
    assert {path.stem for path in tmp_path.glob("*.tar")} == {there.shards[shard].sha256 for shard in wanted}
    loader.close()


def test_a_dataset_elsewhere_gives_the_same_batches(
    dataset: Dataset, reference: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    there = indexed(open_dataset(f"file://{dataset.path}", Cache(str(tmp_path))))
    batches = list(load(there, plan_of(there), range(7), 2, 3, 2))
    for found, expected in zip(joined(batches), reference, strict=True):
        assert torch.equal(found, expected)


# --- validation ---


def validation_rows(dataset: Dataset, micro: int, world_size: int, rows: int | None) -> list[list[Batch]]:
    return [
        list(validation_batches(dataset, LENGTH, MAX_SEGMENT, micro, rank, world_size, rows))
        for rank in range(world_size)
    ]


@settings(max_examples=30)
@given(st.integers(1, 8), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 200)))
def test_validation_is_the_same_rows_for_any_world_size(
    dataset: Dataset, world_size: int, micro: int, rows: int | None
) -> None:
    by_rank = validation_rows(dataset, micro, world_size, rows)
    assert len({len(batches) for batches in by_rank}) == 1  # or ranks would wait for one another
    found, ids = joined([batch for batches in by_rank for batch in batches])
    whole, whole_ids = joined(validation_rows(dataset, 1, 1, None)[0])
    wanted = min(rows or len(whole), len(whole))
    assert torch.equal(found[:wanted], whole[:wanted])
    assert torch.equal(ids[:wanted], whole_ids[:wanted])
    assert (ids[wanted:] == -1).all()
    assert len(found) < wanted + world_size * micro


def test_validation_knows_the_origin_of_each_concept(dataset: Dataset) -> None:
    shards = [open_shard(dataset, index) for index in range(len(dataset.shards))]
    documents = [shard.concepts(document) for shard in shards for document in range(len(shard))]
    seen = 0
    for batch in validation_batches(dataset, LENGTH, MAX_SEGMENT, 4, 0, 1, origins=True):
        assert batch.origins is not None
        assert torch.equal((batch.origins >= 0).all(-1), batch.segment_ids >= 0)
        held = batch.segment_ids >= 0
        for concept, (document, position) in zip(batch.concepts[held], batch.origins[held].tolist(), strict=True):
            assert np.array_equal(concept.numpy(), documents[document][position])
        seen += int(held.sum())
    assert seen == dataset.info.totals.concepts
    assert next(validation_batches(dataset, LENGTH, MAX_SEGMENT, 4, 0, 1)).origins is None


def test_validation_reads_each_concept_once(dataset: Dataset) -> None:
    batches = validation_rows(dataset, 4, 2, None)
    assert sum(b.real_concepts for rank in batches for b in rank) == dataset.info.totals.concepts
    _, ids = joined([batch for rank in batches for batch in rank])
    full = (ids >= 0).all(dim=1)
    assert full[: int(full.sum())].all()  # only the last rows are filled up
