"""The documents behind the steps of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from lcm_ds.data.format import Dataset
from lcm_ds.data.open_shards import OpenShards
from lcm_ds.data.plan import Plan
from lcm_ds.data.shard import Shard, open_shard
from lcm_ds.errors import InputError

SHARDS_KEPT = 256


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
    datasets: Sequence[Dataset], plan: Plan, steps: range, lanes: range | None = None
) -> Iterator[tuple[int, list[TraceLine]]]:
    """The segments of steps.

    Little of a shard is read for it: open the datasets without `checksums`, which would read all of it.

    Args:
        datasets: Those of the plan.
        plan: The order of data.
        steps: Which steps.
        lanes: Which lanes; None for all.

    Yields:
        Each step, and its segments, lane by lane.

    Raises:
        InputError: A shard cannot be read and is not skipped (see `OpenShards.skip`).
    """
    lanes = lanes if lanes is not None else range(plan.rows_per_step)
    shards = _Shards(OpenShards(datasets, plan, lanes))
    for step in steps:
        segments, lines, index = plan.segments(step, lanes), [], 0
        order = zip(*(array.tolist() for array in segments), strict=True)
        for row, column, source, shard, document, start, stop in order:
            index = 0 if column == 0 else index
            try:
                opened = shards.get(source, shard)
                lines.append(_trace_line(lanes[row], index, datasets[source].path, opened, document, start, stop))
                index += 1
            except InputError as error:
                shards.open.skip(source, shard, error)
        yield step, lines


class _Shards:
    """Shards with their headers parsed, of which the last few are kept."""

    def __init__(self, shards: OpenShards) -> None:
        self.open = shards
        self.get = lru_cache(SHARDS_KEPT)(self._get)

    def _get(self, source: int, shard: int) -> Shard:
        self.open.note_tried(source, shard)
        return open_shard(self.open.datasets[source], shard)


def _trace_line(lane: int, index: int, dataset: str, shard: Shard, document: int, start: int, stop: int) -> TraceLine:
    meta = shard.meta(document)
    sentences = tuple(map(str, meta["sentences"][start:stop]))
    return TraceLine(lane, index, dataset, shard.name, shard.keys[document], str(meta["id"]), sentences, start, stop)
