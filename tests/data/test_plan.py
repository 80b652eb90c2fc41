"""Contract 2: the order of data is a pure function of the shards' sizes, the seed and the batch."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcm_ds.data.plan import Piece, Plan, Source, allocate_lanes, document_order, fingerprint, rows_of
from lcm_ds.errors import InputError

shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 9)
sources = st.lists(st.builds(Source, shard_sizes, st.floats(0.5, 2)), min_size=1, max_size=3)


@st.composite
def arguments(draw: st.DrawFn, epochs: st.SearchStrategy[int | None]) -> tuple:
    """What a Plan takes; lanes enough for each of the sources."""
    seed, rows, length = draw(st.integers(0, 2**63 - 1)), draw(st.integers(12, 20)), draw(st.integers(2, 24))
    return draw(sources), seed, rows, length, draw(epochs)


limited = arguments(epochs=st.integers(1, 3))


def lane_stream(plan: Plan, lane: int) -> list[Piece]:
    assert plan.steps is not None
    return [piece for step in range(plan.steps) for piece in plan.pieces(step, lane)]


@given(limited)
def test_each_concept_is_read_once_an_epoch(args: tuple) -> None:
    plan, datasets, epochs = Plan(*args), args[0], args[-1]
    seen: Counter[tuple[int, int, int, int]] = Counter()
    for lane in range(plan.rows_per_step):
        for piece in lane_stream(plan, lane):
            seen.update((piece.source, piece.epoch, piece.shard, c) for c in range(piece.start, piece.stop))
    expected = {
        (number, epoch, shard, concept)
        for number, source in enumerate(datasets)
        for epoch in range(epochs)
        for shard, size in enumerate(source.concepts)
        for concept in range(size)
    }
    assert set(seen) == expected
    assert set(seen.values()) == {1}


@given(limited)
def test_rows_are_full_until_their_lane_ends_and_some_lane_reaches_the_last_step(args: tuple) -> None:
    plan = Plan(*args)
    assert plan.steps is not None
    for lane in range(plan.rows_per_step):
        sizes = [sum(p.stop - p.start for p in plan.pieces(step, lane)) for step in range(plan.steps + 2)]
        full = sum(size == plan.row_length for size in sizes)
        assert sizes[:full] == [plan.row_length] * full
        assert sizes[full] < plan.row_length
        assert not any(sizes[full + 1 :])
        assert all(piece.start < piece.stop for step in range(plan.steps) for piece in plan.pieces(step, lane))
    assert any(plan.pieces(plan.steps - 1, lane) for lane in range(plan.rows_per_step))
    assert not any(plan.pieces(plan.steps, lane) for lane in range(plan.rows_per_step))


@given(arguments(epochs=st.one_of(st.none(), st.integers(1, 3))), st.integers(0, 60))
def test_step_n_found_directly_is_step_n_reached_by_iterating(args: tuple, step: int) -> None:
    walked = Plan(*args)
    lanes = range(walked.rows_per_step)
    rows = [[walked.pieces(s, lane) for lane in lanes] for s in range(step + 1)]
    assert [Plan(*args).pieces(step, lane) for lane in lanes] == rows[step]
    assert [[walked.pieces(s, lane) for lane in reversed(lanes)][::-1] for s in range(step + 1)] == rows


@given(limited)
def test_a_shard_goes_to_the_lane_with_the_fewest_concepts_so_far(args: tuple) -> None:
    """Against the rule in its plainest form; the order of an epoch's shards is read off a plan of one lane."""
    datasets, seed, rows, length, epochs = args
    plan = Plan(*args)
    streams = [lane_stream(plan, lane) for lane in range(rows)]
    first = 0
    for number, (source, lanes) in enumerate(zip(datasets, plan.lanes_per_source, strict=True)):
        before = [Source([1]) for _ in range(number)]  # the order depends on the source's number in the mixture
        alone = Plan([*before, Source(source.concepts)], seed, number + 1, length, epochs)
        order = list(dict.fromkeys((p.epoch, p.shard) for p in lane_stream(alone, number)))
        counts: list[int] = [0] * lanes
        given_out: list[list[tuple[int, int]]] = [[] for _ in range(lanes)]
        for epoch, shard in order:
            lane = counts.index(min(counts))
            counts[lane] += source.concepts[shard]
            given_out[lane].append((epoch, shard))
        found = [list(dict.fromkeys((p.epoch, p.shard) for p in stream)) for stream in streams[first : first + lanes]]
        assert found == given_out
        first += lanes


@given(shard_sizes, st.integers(0, 99), st.integers(1, 9), st.integers(1, 4))
def test_lanes_end_within_one_shard_of_each_other(sizes: list[int], seed: int, lanes: int, epochs: int) -> None:
    plan = Plan([Source(sizes)], seed, lanes, 7, epochs)
    ends = [sum(p.stop - p.start for p in lane_stream(plan, lane)) for lane in range(lanes)]
    assert max(ends) - min(ends) <= max(sizes)


@given(limited)
def test_an_epoch_of_a_shard_is_read_from_its_first_concept_to_its_last_in_one_lane(args: tuple) -> None:
    plan = Plan(*args)
    for lane in range(plan.rows_per_step):
        for a, b in pairwise(lane_stream(plan, lane)):
            if (a.source, a.epoch, a.shard) == (b.source, b.epoch, b.shard):
                assert b.start == a.stop
            else:
                assert a.stop == args[0][a.source].concepts[a.shard]
                assert b.start == 0
                assert b.epoch >= a.epoch


@given(limited)
def test_a_limit_of_epochs_ends_the_order_and_does_not_change_it(args: tuple) -> None:
    plan, endless = Plan(*args), Plan(*args[:-1], None)
    assert endless.steps is None
    for lane in range(plan.rows_per_step):
        stream = lane_stream(plan, lane)
        whole = [p for step in range(plan.steps or 0) for p in endless.pieces(step, lane)]
        assert [p for p in whole if p.epoch < args[-1]] == stream


def test_every_epoch_and_every_seed_has_its_own_order() -> None:
    def shards(seed: int, epoch: int) -> list[int]:
        stream = lane_stream(Plan([Source([3] * 20)], seed, 1, 3, 2), 0)
        return [piece.shard for piece in stream if piece.epoch == epoch]

    orders = [shards(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    documents = [
        document_order(*key, 50) for key in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    ]
    assert all(sorted(order) == list(range(50)) for order in documents)
    assert len({tuple(order) for order in documents}) == 5


GOLDEN_ROWS = [
    [(0, 0, 3, 0, 4), (0, 0, 1, 0, 2)],
    [(0, 0, 0, 0, 5), (0, 0, 4, 0, 1)],
    [(0, 0, 1, 2, 3), (0, 1, 3, 0, 4), (0, 1, 0, 0, 1)],
    [(0, 0, 4, 1, 6), (0, 1, 4, 0, 1)],
    [(0, 1, 0, 1, 5), (0, 1, 1, 0, 2)],
    [(0, 1, 4, 1, 6), (0, 2, 4, 0, 1)],
]  # (source, epoch, shard, start, stop)
GOLDEN_DOCUMENTS = [9, 1, 6, 5, 0, 7, 8, 3, 4, 2]


def test_the_order_is_this_one_with_any_version_of_numpy() -> None:
    plan = Plan([Source([5, 3, 0, 4, 6])], 7, 2, 6)
    assert [[tuple(p) for p in plan.pieces(step, lane)] for step in range(3) for lane in range(2)] == GOLDEN_ROWS
    assert document_order(7, 1, 0, 3, 10).tolist() == GOLDEN_DOCUMENTS


def test_orders_and_fingerprints_of_unsupervised_mixtures_are_those_of_every_version() -> None:
    plan = Plan([Source([5, 3, 0, 4, 6] * 9, 3.0), Source([40, 17, 23], 1.0)], 11, 8, 7, 3)
    assert plan.steps == 18
    pieces = [tuple(p) for step in range(plan.steps) for lane in range(8) for p in plan.pieces(step, lane)]
    digest = hashlib.sha256(repr(pieces).encode()).hexdigest()
    assert digest == "861281ad3145e90302a70ae735fd88d2c27ce7c3684e7d7c2a831fdbe4d696a1"
    mark = fingerprint(["a", "b"], [1, 3], 1, 8, 64, 9)
    assert mark == "81f103a6231dd503c2ad473d33f4e0816d06e37a7885324f78eebe79e5918dec"
    assert fingerprint(["a", "b"], [1, 3], 1, 8, 64, 9, supervised=True) != mark


# --- supervised documents ---


@st.composite
def packed(draw: st.DrawFn) -> tuple[Source, tuple]:
    """A supervised source, and what else a plan of it takes: seed, lanes, row_length and epochs."""
    lengths = draw(
        st.lists(st.lists(st.integers(0, 30), max_size=9), min_size=1, max_size=8).filter(lambda s: any(map(sum, s)))
    )
    row_length = draw(st.integers(2, 24))
    longest = draw(st.integers(2, row_length))
    source = Source([sum(shard) for shard in lengths], 1.0, lengths, longest)
    return source, (draw(st.integers(0, 99)), draw(st.integers(1, 5)), row_length, draw(st.integers(1, 3)))


def segment_ends(source: Source, piece: Piece, seed: int) -> list[int]:
    """Where segments of a piece's shard end, in the order of its epoch."""
    assert source.lengths is not None
    assert source.longest is not None
    lengths, ends, before = source.lengths[piece.shard], [0], 0
    for document in document_order(seed, piece.epoch, piece.source, piece.shard, len(lengths)):
        ends += [before + end for end in range(source.longest, lengths[document], source.longest)]
        before += lengths[document]
        ends.append(before)
    return ends


@settings(max_examples=100)
@given(packed())
def test_a_row_of_supervised_documents_is_full_of_complete_segments(args: tuple[Source, tuple]) -> None:
    source, (seed, lanes, row_length, epochs) = args
    plan = Plan([source], seed, lanes, row_length, epochs)
    assert plan.steps is not None
    seen: Counter[tuple[int, int, int]] = Counter()
    for step in range(plan.steps):
        for lane in range(lanes):
            for piece in plan.pieces(step, lane):
                ends = segment_ends(source, piece, seed)
                assert 0 < piece.stop - piece.start <= row_length
                assert {piece.start, piece.stop} <= set(ends)
                later = [end for end in ends if end > piece.stop]
                assert not later or min(later) - piece.start > row_length  # the next segment would not have fitted
                seen.update((piece.epoch, piece.shard, concept) for concept in range(piece.start, piece.stop))
            assert len(plan.pieces(step, lane)) <= 1
        assert plan.epoch(step + 1) == len(seen) / sum(source.concepts)
    expected = {(e, s, c) for e in range(epochs) for s, size in enumerate(source.concepts) for c in range(size)}
    assert set(seen) == expected
    assert set(seen.values()) == {1}
    assert not any(plan.pieces(plan.steps, lane) for lane in range(lanes))
    assert any(plan.pieces(plan.steps - 1, lane) for lane in range(lanes))


@given(packed(), st.integers(0, 60))
def test_step_n_of_supervised_documents_is_found_directly_too(args: tuple[Source, tuple], step: int) -> None:
    source, (seed, lanes, row_length, _) = args
    walked = Plan([source], seed, lanes, row_length)
    rows = [[walked.pieces(s, lane) for lane in range(lanes)] for s in range(step + 1)]
    assert [Plan([source], seed, lanes, row_length).pieces(step, lane) for lane in range(lanes)] == rows[step]
    assert all(len(row) == 1 for row in rows[step])  # epochs follow one another without an empty row


def test_a_segment_that_would_be_cut_begins_the_next_row() -> None:
    assert rows_of(np.array([5, 4, 3, 10, 2]), 10, 10) == [0, 9, 12, 22, 24]
    assert rows_of(np.array([7, 0, 9, 3]), 4, 8) == [0, 7, 15, 19]  # 4 and 3; 4 and 4; 1 and 3
    assert rows_of(np.array([], np.int64), 4, 8) == [0]


def test_places_are_those_of_the_rows_of_the_first_epoch() -> None:
    supervised = Source([12], 1.0, [[5, 4, 3]], 10)
    assert Plan([supervised, Source([24])], 0, 2, 10).row_slots == 20 + 24
    assert Plan([supervised, Source([24])], 0, 2, 10).packs(0)


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
        Plan([Source([4], 1.0), Source([4], 0.01)], 0, 8, 4)
    with pytest.raises(InputError, match="dataset 1 of the mixture holds no concepts"):
        Plan([Source([4]), Source([0, 0])], 0, 8, 4)


def test_a_lane_holds_one_source_and_both_go_on_when_one_is_exhausted() -> None:
    plan = Plan([Source([10, 10], 1), Source([100, 100, 100], 1)], 0, 4, 5, epochs=1)
    assert plan.steps == 40
    for lane in range(4):
        assert {piece.source for piece in lane_stream(plan, lane)} == {lane // 2}


def test_epoch_is_concepts_seen_over_concepts_there_are() -> None:
    plan = Plan([Source([50, 50])], 0, 2, 10)
    assert [plan.epoch(step) for step in (0, 1, 5, 10)] == [0.0, 0.2, 1.0, 2.0]
    assert Plan([Source([50, 50])], 0, 2, 10, epochs=1).epoch(100) == 1.0


@given(arguments(epochs=st.none() | st.integers(1, 3)), st.integers(0, 60))
def test_rows_of_lanes_that_have_ended_count_nothing(args: tuple, steps: int) -> None:
    plan = Plan(*args)
    rows = [plan.pieces(step, lane) for step in range(steps) for lane in range(plan.rows_per_step)]
    assert plan.concepts(steps) == sum(piece.stop - piece.start for row in rows for piece in row)
    assert plan.epoch(steps) == plan.concepts(steps) / sum(sum(source.concepts) for source in args[0])


def test_an_epoch_of_fewer_shards_than_lanes_is_not_over_before_its_last_concept() -> None:
    """The one lane with a shard reads for 2,125 steps; fifteen empty rows a step are no progress."""
    plan = Plan([Source([34_000])], 1, 16, 16, epochs=1)
    assert [plan.epoch(step) for step in (0, 425, 2125)] == [0.0, 0.2, 1.0]


def test_the_epoch_of_150_000_shards_is_told_without_going_through_them() -> None:
    plan = Plan([Source([400_000] * 150_000)], 0, 224, 1024, epochs=1)
    assert plan.steps is not None  # the lanes are laid out
    started = time.perf_counter()
    assert 0.99 < plan.epoch(plan.steps - 1) < plan.epoch(plan.steps) == 1.0
    assert time.perf_counter() - started < 0.1


def test_fingerprint_changes_with_all_that_decides_the_order_and_with_nothing_else() -> None:
    same = {
        "datasets": ["a", "b"],
        "weights": [1, 3],
        "seed": 1,
        "rows_per_step": 8,
        "row_length": 64,
        "max_segment": 9,
    }
    other = {
        "datasets": ["b", "a"],
        "weights": [1, 2],
        "seed": 2,
        "rows_per_step": 4,
        "row_length": 32,
        "max_segment": 8,
    }
    marks = {fingerprint(**same), *(fingerprint(**{**same, key: value}) for key, value in other.items())}
    assert len(marks) == 1 + len(other)
    assert fingerprint(**{**same, "weights": [2, 6]}) == fingerprint(**same)


def test_150_000_shards_take_less_than_300_mb() -> None:
    """In a process of its own, which has used no more memory before."""
    code = """
import re
import numpy as np
from lcm_ds.data.plan import Plan, Source
sizes = np.random.default_rng(0).integers(300_000, 500_000, 150_000).tolist()
memory = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = memory()
plan = Plan([Source(sizes)], 0, 224, 1024)
assert plan.pieces(100_000, 7)
print(memory() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) * 1024 < 300e6  # measured: 11 MB


@settings(max_examples=3)
@given(st.integers(0, 2**63 - 1))
def test_60_billion_concepts_in_150_000_shards(seed: int) -> None:
    sizes = np.random.default_rng(0).integers(300_000, 500_000, 150_000)
    began = time.perf_counter()
    plan = Plan([Source(sizes)], seed, 224, 1024)
    plan.pieces(0, 0)
    assert time.perf_counter() - began < 3  # measured: 0.1
    spans = []
    for step in range(0, 200_001, 10_000):
        began = time.perf_counter()
        rows = [plan.pieces(step, lane) for lane in range(224)]
        spans.append(time.perf_counter() - began)
        assert all(sum(p.stop - p.start for p in row) == 1024 for row in rows)
        assert len({row[0].shard for row in rows}) == 224
    assert min(spans) < 1e-3  # measured: 0.0004
