"""The documents behind the steps of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lcm_ds.data.format import Dataset
from lcm_ds.data.open_shards import MIN_CACHED, OpenShards
from lcm_ds.data.plan import Plan
from lcm_ds.data.rows import Segment
from lcm_ds.errors import InputError


class TraceLine(NamedTuple):
    """A segment of a step, and its document."""

    lane: int
    segment: int  # in the row
    dataset: str  # its path
    shard: str
    key: str
    id: str
    sentences: tuple[str, ...]  # of the segment; none if the dataset keeps none
    start: int  # concepts, counted in the document
    stop: int


def trace(
    datasets: Sequence[Dataset], plan: Plan, max_segment: int, steps: range, lanes: range | None = None
) -> Iterator[tuple[int, list[TraceLine]]]:
    """The segments of steps.

    Little of a shard is read for it: open the datasets without `checksums`, which would read all of it.

    Args:
        datasets: Those of the plan.
        plan: The order of data.
        max_segment: Concepts of a segment, at most.
        steps: Which steps.
        lanes: Which lanes; None for all.

    Yields:
        Each step, and its segments, lane by lane.

    Raises:
        InputError: A shard cannot be read and is not skipped (see `OpenShards.skip`).
    """
    shards = OpenShards(datasets, plan, max_segment, MIN_CACHED, plan.rows_per_step)
    for step in steps:
        yield step, [line for lane in lanes or range(plan.rows_per_step) for line in _trace_row(shards, step, lane)]


def _trace_row(shards: OpenShards, step: int, lane: int) -> list[TraceLine]:
    lines: list[TraceLine] = []
    for piece in shards.plan.pieces(step, lane):
        dataset = shards.datasets[piece.source].path
        try:
            segments = enumerate(shards.segments(piece), start=len(lines))
            lines += [_trace_line(lane, i, dataset, segment) for i, segment in segments]
        except InputError as error:
            shards.skip(piece, error)
    return lines


def _trace_line(lane: int, index: int, dataset: str, segment: Segment) -> TraceLine:
    shard, document, start, stop = segment
    meta = shard.meta(document)
    sentences = tuple(map(str, meta["sentences"][start:stop]))
    return TraceLine(lane, index, dataset, shard.name, shard.keys[document], str(meta["id"]), sentences, start, stop)
