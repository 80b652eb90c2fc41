"""Contract 2: a row is cut by count of concepts alone; segments lie in one document and are wrapped at max_segment."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcm_ds.data.format import open_dataset
from lcm_ds.data.plan import document_order
from lcm_ds.data.rows import Row, Segment, ShuffledShard, clear, copy_segments, iter_segments
from lcm_ds.data.shard import Shard, open_shard


@pytest.fixture(scope="module")
def shard(synthetic_dataset: Callable[..., Path]) -> Shard:
    return open_shard(open_dataset(synthetic_dataset(lengths=(2, 60))), 0)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=10), st.integers(2, 12), st.data())
def test_segments_are_the_concepts_asked_for_cut_at_documents_and_at_multiples_of_max_segment(
    shard: Shard, lengths: list[int], max_segment: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(lengths))))
    read = ShuffledShard(shard, order, list(accumulate(lengths[d] for d in order)))
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, sum(lengths))] * 2)))
    everything = [(document, concept) for document in order for concept in range(lengths[document])]
    segments = list(iter_segments(read, start, stop, max_segment))
    assert [(s.document, c) for s in segments for c in range(s.start, s.stop)] == everything[start:stop]
    for segment in segments:
        assert segment.start < segment.stop
        assert segment.start // max_segment == (segment.stop - 1) // max_segment
    for a, b in pairwise(segments):
        assert a.document != b.document or b.start % max_segment == 0


@given(st.integers(2, 12), st.data())
def test_the_end_of_a_row_does_not_move_where_a_document_is_wrapped(
    shard: Shard, max_segment: int, data: st.DataObject
) -> None:
    read = ShuffledShard.of(shard, document_order(0, 0, 0, 0, len(shard)))
    end = data.draw(st.integers(0, read.ends[-1]))
    whole = list(iter_segments(read, 0, read.ends[-1], max_segment))
    first, second = (
        list(iter_segments(read, 0, end, max_segment)),
        list(iter_segments(read, end, read.ends[-1], max_segment)),
    )
    if first and second and (first[-1], second[0]) not in list(pairwise(whole)):
        a, b = first.pop(), second.pop(0)  # the one segment that the row's end cut
        assert (a.document, a.stop) == (b.document, b.start)
        first.append(Segment(shard, a.document, a.start, b.stop))
    assert first + second == whole


def test_a_part_of_a_row_holds_its_segments_one_after_another_and_zeros_where_there_are_none(shard: Shard) -> None:
    segments = [Segment(shard, 2, 0, 2), Segment(shard, 0, 1, 2), Segment(shard, 2, 1, 2)]
    concepts, ids = np.full((6, shard.embed_dim or 0), 7, np.float16), np.full(6, 7, np.int32)
    row = Row(concepts, ids, given=None, origins=None)
    assert copy_segments(segments, row.part(slice(0, 4)), 5) == 8
    assert ids.tolist() == [5, 5, 6, 7, 7, 7]
    assert (concepts[4:] == 7).all()
    expected = [shard.concepts(2)[0], shard.concepts(2)[1], shard.concepts(0)[1], shard.concepts(2)[1]]
    np.testing.assert_array_equal(concepts[:4], expected)
    clear(row)
    assert not concepts.any()
    assert ids.tolist() == [-1] * 6
