"""Contract 2: the order of data is a pure function of the documents' lengths, the seed and the batch."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import patience

from lcm_ds.data import plan as plan_module
from lcm_ds.data.plan import Plan, Segments, Source, allocate_lanes, fingerprint, permutation, rows_of
from lcm_ds.errors import InputError


def source(lengths: Sequence[Sequence[int]], longest: int = 9, weight: float = 1.0, **options: object) -> Source:
    """A dataset whose shards have documents of so many concepts."""
    arrays = [np.array(shard, np.int64) for shard in lengths]
    counts = [int(array.sum()) for array in arrays]
    return Source(counts, [len(shard) for shard in lengths], arrays.__getitem__, longest, weight, **options)  # type: ignore[arg-type]


shards = st.lists(st.lists(st.integers(0, 30), max_size=6), min_size=1, max_size=8).filter(lambda s: any(map(sum, s)))
sources = st.lists(
    st.builds(source, shards, st.integers(1, 20), st.floats(0.5, 2), shuffle_shards=st.none() | st.integers(1, 4)),
    min_size=1,
    max_size=3,
)


@st.composite
def arguments(draw: st.DrawFn, epochs: st.SearchStrategy[int | None]) -> tuple:
    """What a Plan takes; lanes enough for each of the sources."""
    seed, rows, length = draw(st.integers(0, 2**63 - 1)), draw(st.integers(12, 20)), draw(st.integers(2, 24))
    return draw(sources), seed, rows, length, draw(epochs)


@st.composite
def packed(draw: st.DrawFn) -> tuple:
    """What a Plan of one supervised source takes."""
    row_length = draw(st.integers(2, 24))
    options = {"packs": True, "shuffle_shards": draw(st.none() | st.integers(1, 3))}
    made = source(draw(shards), draw(st.integers(2, row_length)), **options)  # type: ignore[arg-type]
    return [made], draw(st.integers(0, 99)), draw(st.integers(1, 5)), row_length, draw(st.integers(1, 3))


limited = arguments(epochs=st.integers(1, 3))


class Part(NamedTuple):
    """A segment."""

    row: int
    column: int
    source: int
    shard: int
    document: int
    start: int
    stop: int


def parts(segments: Segments) -> list[Part]:
    return [Part(*values) for values in zip(*(array.tolist() for array in segments), strict=True)]


def step_of(plan: Plan, step: int) -> list[Part]:
    return parts(plan.segments(step, range(plan.rows_per_step)))


def stream(plan: Plan) -> Iterator[Part]:
    """Everything, step by step."""
    assert plan.steps is not None
    for step in range(plan.steps):
        yield from step_of(plan, step)


def reads(found: Iterator[Part] | list[Part]) -> Counter[tuple[int, ...]]:
    """How often each concept is read: (source, shard, document, concept)."""
    return Counter((p.source, p.shard, p.document, concept) for p in found for concept in range(p.start, p.stop))


def concepts_of(datasets: Sequence[Source]) -> set[tuple[int, ...]]:
    return {
        (number, shard, document, concept)
        for number, each in enumerate(datasets)
        for shard in range(len(each.concepts))
        for document, length in enumerate(each.lengths(shard).tolist())
        for concept in range(length)
    }


def filled(plan: Plan, step: int) -> list[int]:
    """Concepts in each row of a step, whose segments lie one after another."""
    ends = [0] * plan.rows_per_step
    for part in step_of(plan, step):
        assert part.column == ends[part.row]
        ends[part.row] += part.stop - part.start
    return ends


@given(limited | packed())
def test_each_concept_is_read_once_an_epoch(args: tuple) -> None:
    found = reads(stream(Plan(*args)))
    assert set(found) == concepts_of(args[0])
    assert set(found.values()) == {args[-1]}


@given(arguments(epochs=st.just(3)))
def test_an_epoch_is_over_before_the_next_begins(args: tuple) -> None:
    """So in each stream; the first lanes of a mixture are not held back by the last."""
    plan = Plan(*args)
    for number in range(len(args[0])):
        seen: Counter[tuple[int, ...]] = Counter()
        everything = {each for each in concepts_of(args[0]) if each[0] == number}
        for part in stream(plan):
            if part.source == number:
                for concept in range(part.start, part.stop):
                    key = (number, part.shard, part.document, concept)
                    assert seen[key] == min(seen.values(), default=0) or len(seen) < len(everything)
                    seen[key] += 1
                    assert seen[key] == 1 or len(seen) == len(everything)


@given(limited)
def test_every_row_is_full_but_the_last_of_a_stream(args: tuple) -> None:
    plan = Plan(*args)
    assert plan.steps is not None
    steps = [filled(plan, step) for step in range(plan.steps + 2)]
    lane = 0
    for each, lanes in zip(args[0], plan.lanes_per_source, strict=True):
        rows = [size for step in steps for size in step[lane : lane + lanes]]
        total = args[-1] * sum(each.concepts)
        assert rows[: -(-total // plan.row_length)] == [plan.row_length] * (total // plan.row_length) + (
            [total % plan.row_length] if total % plan.row_length else []
        )
        assert not any(rows[-(-total // plan.row_length) :])
        lane += lanes
    assert any(steps[plan.steps - 1])
    assert not any(steps[plan.steps])


@given(shards, st.integers(1, 64), st.integers(2, 40), st.integers(1, 4))
def test_an_epoch_has_as_many_steps_as_its_concepts_fill(
    lengths: list[list[int]], rows: int, length: int, epochs: int
) -> None:
    plan = Plan([source(lengths)], 3, rows, length, epochs)
    total = sum(map(sum, lengths))
    assert plan.steps == -(-epochs * total // (rows * length))
    assert plan.epoch(plan.steps) == epochs
    assert plan.row_slots == total


@given(limited | packed())
def test_a_segment_lies_in_a_document_and_is_wrapped_where_rows_do_not_matter(args: tuple) -> None:
    plan = Plan(*args)
    for part in stream(plan):
        each = args[0][part.source]
        assert 0 <= part.start < part.stop <= each.lengths(part.shard)[part.document]
        assert part.start // each.longest == (part.stop - 1) // each.longest
        begins_or_continues = part.start % each.longest == 0 or part.column == 0
        ends_or_is_cut = (
            part.stop % each.longest == 0
            or part.stop == each.lengths(part.shard)[part.document]
            or part.column + part.stop - part.start == plan.row_length
        )
        assert begins_or_continues
        assert ends_or_is_cut


@given(arguments(epochs=st.none() | st.integers(1, 3)) | packed(), st.integers(0, 60), st.data())
def test_step_n_found_directly_is_step_n_reached_by_iterating(args: tuple, step: int, data: st.DataObject) -> None:
    walked = Plan(*args)
    steps = [step_of(walked, s) for s in range(step + 1)]
    assert step_of(Plan(*args), step) == steps[step]
    first = data.draw(st.integers(0, walked.rows_per_step - 1))
    last = data.draw(st.integers(first + 1, walked.rows_per_step))
    own = parts(Plan(*args).segments(step, range(first, last)))
    assert own == [part._replace(row=part.row - first) for part in steps[step] if first <= part.row < last]


@given(limited)
def test_a_limit_of_epochs_ends_the_order_and_does_not_change_it(args: tuple) -> None:
    plan, endless = Plan(*args), Plan(*args[:-1], None)
    assert endless.steps is None
    for step in range(plan.steps or 0):
        going_on = step_of(endless, step)
        ends = dict(enumerate(filled(plan, step)))
        assert step_of(plan, step) == [
            part._replace(stop=min(part.stop, part.start + ends[part.row] - part.column))
            for part in going_on
            if part.column < ends[part.row]
        ]


def test_every_epoch_and_every_seed_has_its_own_order() -> None:
    def documents(seed: int) -> list[list[tuple[int, int]]]:
        found = [(part.shard, part.document) for part in stream(Plan([source([[1] * 5] * 4)], seed, 2, 10, 2))]
        return [found[:20], found[20:]]

    orders = documents(0) + documents(1)
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    permutations = [permutation(f"documents/{n}", 50) for n in range(5)]
    assert all(sorted(each.tolist()) == list(range(50)) for each in permutations)
    assert len({tuple(each.tolist()) for each in permutations}) == 5


GOLDEN_ROWS = [
    [
        (0, 0, 0, 3, 1, 0, 1),
        (0, 1, 0, 0, 1, 0, 2),
        (0, 3, 0, 4, 0, 0, 3),
        (1, 0, 0, 4, 0, 3, 4),
        (1, 1, 0, 4, 0, 4, 6),
        (1, 3, 0, 3, 0, 0, 3),
    ],
    [(0, 0, 0, 3, 0, 3, 4), (0, 1, 0, 0, 0, 0, 4), (0, 5, 0, 0, 0, 4, 5), (1, 0, 0, 1, 0, 0, 3), (1, 3, 0, 3, 0, 0, 3)],
    [
        (0, 0, 0, 3, 0, 3, 4),
        (0, 1, 0, 4, 0, 0, 4),
        (0, 5, 0, 4, 0, 4, 5),
        (1, 0, 0, 4, 0, 5, 6),
        (1, 1, 0, 3, 1, 0, 1),
        (1, 2, 0, 0, 0, 0, 4),
    ],
]  # (row, column, source, shard, document, start, stop)
GOLDEN_PERMUTATION = [8, 3, 6, 4, 5, 2, 1, 0, 7, 9]


def test_the_order_is_this_one_with_any_version_of_numpy() -> None:
    plan = Plan([source([[5, 2], [3], [], [4, 1], [6]], 4)], 7, 2, 6)
    assert [[tuple(part) for part in step_of(plan, step)] for step in range(3)] == GOLDEN_ROWS
    assert permutation("a", 10).tolist() == GOLDEN_PERMUTATION
    mixed = [source([[5, 3, 4, 6], [2]] * 9, 5, 3.0, shuffle_shards=4), source([[40, 17], [23]], 8, 1.0, packs=True)]
    found = [tuple(part) for part in stream(Plan(mixed, 11, 8, 9, 3))]
    assert (
        hashlib.sha256(repr(found).encode()).hexdigest()
        == "848c947ca51e70477331f4b942e9f3ee07d0a353160b3bd940a3933928e218ee"
    )
    assert (
        fingerprint(["a", "b"], [1, 3], 1, 8, 64, 9, [None, 4], 2)
        == "c2fa1e87a9201679d13a8921b2185ff3088f7d5a525959ef847beae912dbfde2"
    )


# --- blocks and streams ---


def test_each_block_has_one_of_each_so_many_shards_that_lie_together() -> None:
    plan = Plan([source([[1]] * 100, shuffle_shards=20)], 0, 10, 2)
    for epoch in range(2):
        for number in range(5):
            _, own = plan.shards(plan_module.BlockId(0, epoch, number))
            assert (own // 5).tolist() == list(range(20))
    _, another = plan.shards(plan_module.BlockId(0, 1, 4))
    assert own.tolist() == another.tolist()
    assert len({tuple(plan.shards(plan_module.BlockId(0, epoch, 0))[1].tolist()) for epoch in range(3)}) == 3


def test_blocks_say_what_is_read_now_and_what_comes_next() -> None:
    plan = Plan([source([[8]] * 6, shuffle_shards=2)], 0, 2, 8, 2)  # a step is a block
    for step in range(6):
        now, *later = plan.blocks(step, range(2))
        assert (now.epoch, now.number) == divmod(step, 3)
        assert [(each.epoch, each.number) for each in later] == [divmod(step + 1, 3)] * (step < 5)
        assert {part.shard for part in step_of(plan, step)} == set(plan.shards(now)[1].tolist())


def test_a_block_has_so_many_documents_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "BLOCK_DOCUMENTS", 100)
    plan = Plan([source([[1] * 30] * 10)], 0, 1, 4)
    sizes = [len(plan.shards(plan_module.BlockId(0, 0, number))[1]) for number in range(3)]
    assert sum(sizes) == 10
    assert max(sizes) * 30 <= 120
    monkeypatch.undo()
    assert Plan([source([[1] * 30] * 10)], 0, 1, 4).blocks(0, range(1))[1].epoch == 1  # one is enough


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 9))
def test_each_stream_has_its_own_shards_and_its_own_lanes(streams: int, lanes: int, seed: int) -> None:
    lengths = [[3, 4, 5]] * (2 * streams + 1)
    plan = Plan([source(lengths, streams=streams)], seed, streams * lanes, 7, 2)
    assert set(reads(stream(plan)).values()) == {2}
    owners: dict[int, set[int]] = {}
    for part in stream(plan):
        owners.setdefault(part.shard, set()).add(part.row // lanes)
    assert all(len(owner) == 1 for owner in owners.values())
    for number in range(streams):
        assert plan.streams(0, range(number * lanes, (number + 1) * lanes)) == 1
    assert plan.streams(0, range(streams * lanes)) == streams
    assert plan.most_shards(0) == 3


def test_streams_that_cannot_be_dealt_are_refused() -> None:
    with pytest.raises(InputError, match=r"data\.streams: 3 of dataset 0, which has 8 rows of a step and 4 shards"):
        Plan([source([[3]] * 4, streams=3)], 0, 8, 4)
    with pytest.raises(InputError, match=r"data\.streams: 4 of dataset 0, which has 8 rows of a step and 2 shards"):
        Plan([source([[3]] * 2, streams=4)], 0, 8, 4)


# --- every step a fair sample ---


def variance_ratio(lengths: np.ndarray, shards: int, topic: int, rows: int, steps: int, **options: object) -> float:
    """The variance of the mean over `steps` steps, of documents ordered by topic, over that of random documents.

    A third of the variance of a concept is its topic's, a third its document's, a third its own.
    """
    documents = len(lengths)
    own = [np.asarray(part) for part in np.array_split(lengths, shards)]
    firsts = np.cumsum([0] + [len(part) for part in own])
    plan = Plan(
        [Source([int(p.sum()) for p in own], [len(p) for p in own], own.__getitem__, 128, **options)],  # type: ignore[arg-type]
        0,
        rows,
        256,
        1,
    )
    random = np.random.default_rng(1)
    ratios = []
    assert plan.steps is not None
    for first in range(0, plan.steps - steps, steps):
        weights = np.zeros(documents)
        for step in range(first, first + steps):
            found = plan.segments(step, range(rows))
            np.add.at(weights, firsts[found.shard] + found.document, found.stop - found.start)
        weights /= weights.sum()
        topics = np.bincount(np.arange(documents) // topic, weights)
        shuffled = np.bincount(random.permutation(documents) // topic, weights)
        ratios.append((np.square(topics).sum(), np.square(shuffled).sum(), np.square(weights).sum()))
    ordered, fair, each = np.mean(ratios, axis=0)
    return (ordered + each) / (fair + each)


@pytest.mark.parametrize("shards", [400, 40])
@pytest.mark.parametrize("topic", [50, 1000])
@pytest.mark.parametrize("steps", [1, 10])
def test_steps_are_fair_samples_of_documents_ordered_by_topic(shards: int, topic: int, steps: int) -> None:
    lengths = np.random.default_rng(0).integers(5, 55, 40_000)
    assert variance_ratio(lengths, shards, topic, 8, steps) < 1.05
    # In blocks of a quarter, too, where a topic has several shards: a block has one of each four that lie together.
    if (shards, topic) == (400, 1000):
        assert variance_ratio(lengths, shards, topic, 8, steps, shuffle_shards=100) < 1.1


# --- supervised documents ---


@settings(max_examples=100)
@given(packed())
def test_a_row_of_supervised_documents_is_full_of_complete_segments(args: tuple) -> None:
    (each,), _, lanes, row_length, _ = args
    plan = Plan(*args)
    rows: list[list[Part]] = []
    for step in range(plan.steps or 0):
        found = step_of(plan, step)
        rows += [[part for part in found if part.row == lane] for lane in range(lanes)]
    last = max(i for i, row in enumerate(rows) if row)
    assert all(rows[: last + 1])
    for row in rows:
        for part in row:
            length = int(each.lengths(part.shard)[part.document])
            assert part.start % each.longest == 0
            assert part.stop == min(length, part.start + each.longest)
        assert sum(part.stop - part.start for part in row) <= row_length
    assert plan.concepts(plan.steps or 0) == sum(part.stop - part.start for row in rows for part in row)


def test_a_segment_that_would_be_cut_begins_the_next_row() -> None:
    assert rows_of(np.array([5, 4, 3, 10, 2]), 10, 10).tolist() == [0, 9, 12, 22, 24]
    assert rows_of(np.array([7, 0, 9, 3]), 4, 8).tolist() == [0, 7, 15, 19]  # 4 and 3; 4 and 4; 1 and 3
    assert rows_of(np.array([], np.int64), 4, 8).tolist() == [0]
    # In a plan of one block: no row has room for the segment that begins the next.
    plan = Plan([source([[5, 4, 3], [10, 2]], 10, packs=True)], 0, 1, 10, 1)
    rows = [step_of(plan, step) for step in range(plan.steps or 0)]
    for row, after in pairwise(rows):
        assert sum(p.stop - p.start for p in row) + after[0].stop - after[0].start > 10


def test_row_slots_are_those_of_the_rows_of_the_first_epoch() -> None:
    supervised = source([[5, 4, 6]], 10, packs=True)
    assert Plan([supervised, source([[24]])], 0, 2, 10).row_slots == 20 + 24
    assert Plan([supervised, source([[24]])], 0, 2, 10).rows(0) == 2


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5), st.integers(300, 500))
def test_lanes_are_shared_out_by_weight(weights: list[float], lanes: int) -> None:
    counts = allocate_lanes(weights, lanes)
    assert sum(counts) == lanes
    assert all(abs(c - w * lanes / sum(weights)) < 1 + 1e-6 for c, w in zip(counts, weights, strict=True))


def test_largest_remainder_gets_the_odd_lane() -> None:
    assert allocate_lanes([0.7, 0.2, 0.1], 16) == [11, 3, 2]  # 11.2, 3.2, 1.6
    assert allocate_lanes([1, 1, 1], 8) == [3, 3, 2]  # the first of equals
    assert allocate_lanes([0.1, 0.3], 4) == [1, 3]


def test_a_dataset_without_a_lane_or_without_concepts_is_refused() -> None:
    with pytest.raises(InputError, match="dataset 1 would never be read"):
        Plan([source([[4]]), source([[4]], weight=0.01)], 0, 8, 4)
    with pytest.raises(InputError, match="dataset 1 of the mixture holds no concepts"):
        Plan([source([[4]]), source([[0], []])], 0, 8, 4)


def test_a_lane_holds_one_source_and_both_go_on_when_one_is_exhausted() -> None:
    plan = Plan([source([[10], [10]]), source([[100]] * 3)], 0, 4, 5, epochs=1)
    assert plan.steps == 30
    assert all(part.source == part.row // 2 for part in stream(plan))


def test_epoch_is_concepts_seen_over_concepts_there_are() -> None:
    plan = Plan([source([[50], [50]])], 0, 2, 10)
    assert [plan.epoch(step) for step in (0, 1, 5, 10)] == [0.0, 0.2, 1.0, 2.0]
    assert Plan([source([[50], [50]])], 0, 2, 10, epochs=1).epoch(100) == 1.0


@given(arguments(epochs=st.none() | st.integers(1, 3)) | packed(), st.integers(0, 60))
def test_concepts_are_those_in_the_rows_so_far(args: tuple, steps: int) -> None:
    plan = Plan(*args)
    assert plan.concepts(steps) == sum(part.stop - part.start for s in range(steps) for part in step_of(plan, s))
    assert plan.epoch(steps) == plan.concepts(steps) / sum(sum(each.concepts) for each in args[0])


def test_fingerprint_changes_with_all_that_decides_the_order_and_with_nothing_else() -> None:
    same = {
        "datasets": ["a", "b"],
        "weights": [1, 3],
        "seed": 1,
        "rows_per_step": 8,
        "row_length": 64,
        "max_segment": 9,
        "shuffle_shards": [None, 4],
        "streams": 1,
    }
    other = {
        "datasets": ["b", "a"],
        "weights": [1, 2],
        "seed": 2,
        "rows_per_step": 4,
        "row_length": 32,
        "max_segment": 8,
        "shuffle_shards": [None, 5],
        "streams": 2,
    }
    marks = {fingerprint(**same), *(fingerprint(**{**same, key: value}) for key, value in other.items())}  # type: ignore[arg-type]
    assert len(marks) == 1 + len(other)
    assert fingerprint(**{**same, "weights": [2, 6]}) == fingerprint(**same)  # type: ignore[arg-type]


BIG = """
import re, time
import numpy as np
from lcm_ds.data.plan import Plan, Source
documents = 2_000_000_000 // 150_000
lengths = np.random.default_rng(0).integers(5, 55, documents).astype(np.uint32)
memory = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before, began = memory(), time.perf_counter()
plan = Plan([Source([int(lengths.sum())] * 150_000, [documents] * 150_000, lambda shard: lengths, 128)], 0, 224, 1024)
assert plan.steps is None
plan.lay_out(plan.blocks(0, range(224))[0])
first = time.perf_counter() - began
seconds = []
for step in (1, 2, 3, 500_000, 500_001, 500_002):
    plan.segments(step, range(224))
    began = time.perf_counter()
    found = plan.segments(step + 10, range(224))
    seconds.append(time.perf_counter() - began)
    assert int((found.stop - found.start).sum()) == 224 * 1024
print(memory() - before, first, min(seconds))
"""


def test_60_billion_concepts_in_150_000_shards() -> None:
    """In a process of its own, which has used no more memory before."""
    done = subprocess.run([sys.executable, "-c", BIG], capture_output=True, text=True, check=True)
    memory, first, step = map(float, done.stdout.split())
    assert memory * 1024 < 500e6
    assert first < 3 * patience(1)
    assert step < 0.005 * patience(1)
