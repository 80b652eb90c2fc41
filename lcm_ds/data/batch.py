"""Batches: rows of the plan, read from open shards."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from lcm_ds.data.buffers import Buffers
from lcm_ds.data.open_shards import OpenShards
from lcm_ds.data.plan import Plan
from lcm_ds.data.rows import Rows, fill_rows


def target_mask(segment_ids: Tensor, given: Tensor | None = None) -> Tensor:
    """Which concepts are targets: every concept of a segment but its first, unless it is given.

    segment_ids: [rows, row_length], -1 for padding; given: bool [rows, row_length]. Returns bool [rows,
    row_length - 1]; entry t tells whether concept t + 1 has to be predicted from concept t.
    """
    mask = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] >= 0)
    return mask if given is None else mask & ~given[:, 1:]


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank."""

    concepts: Tensor  # [rows, row_length, embed_dim], raw space, stored dtype; zeros for padding
    segment_ids: Tensor  # int32 [rows, row_length]: 0, 1, 2 … in a row; −1 for padding
    step: int
    index: int  # of the micro-batch in its step
    first_lane: int  # of its first row, counted over all ranks; validation: the index of its first row
    missing: int = 0  # concepts of shards that could not be read; padding takes their place
    # of validation, int64 [rows, row_length, 2]: a concept's document, counted through the dataset in the order of its
    # shards, and its position in that; −1 for padding
    origins: Tensor | None = None
    # of supervised datasets, bool [rows, row_length]: concepts that are no targets because they belong to a document's
    # source, or to a segment that does not begin with it
    given: Tensor | None = None

    @property
    def target_mask(self) -> Tensor:
        """Which concepts the model has to predict: bool [rows, row_length - 1] (see `target_mask`)."""
        return target_mask(self.segment_ids, self.given)

    @property
    def targets(self) -> int:
        """Concepts that the model has to predict."""
        return int(self.target_mask.sum())

    @property
    def real_concepts(self) -> int:
        """Concepts that are not padding."""
        return int((self.segment_ids >= 0).sum())


class BatchReader:
    """Assembles batches of `micro_batch_rows` rows. Safe to use from several threads."""

    def __init__(self, shards: OpenShards, plan: Plan, micro_batch_rows: int, pinned: bool = False) -> None:
        self._shards, self._plan, datasets = shards, plan, shards.datasets
        dtype = torch.float32 if any(d.info.dtype in ("float32", "bfloat16") for d in datasets) else torch.float16
        self._buffers = Buffers((micro_batch_rows, plan.row_length, datasets[0].embed_dim), dtype, pinned)
        self._supervised = any(dataset.info.supervised is not None for dataset in datasets)
        # Documents before each shard of a dataset.
        self._before = [np.array([*accumulate((s.documents for s in d.shards), initial=0)]) for d in datasets]

    def read(self, step: int, lanes: range, index: int, first_lane: int, origins: bool = False) -> Batch:
        """A batch of rows of the plan.

        Args:
            step: Of the plan.
            lanes: One after another; if they are fewer than the batch's rows, the last rows are padding.
            index: As in `Batch`.
            first_lane: As in `Batch`.
            origins: Whether the batch has `origins`.

        Returns:
            The batch.

        Raises:
            InputError: A shard cannot be read and is not skipped (see `OpenShards.skip`).
        """
        concepts = self._buffers.take()
        shape = concepts.shape[:2]
        segment_ids = torch.empty(shape, dtype=torch.int32)
        given = torch.empty(shape, dtype=torch.bool) if self._supervised else None
        origin = torch.empty(*shape, 2, dtype=torch.int64) if origins else None
        rows = Rows(*(None if t is None else t.numpy() for t in (concepts, segment_ids, given, origin)))  # type: ignore[arg-type]
        missing = fill_rows(self._plan.segments(step, lanes), rows, self._shards, self._before)
        return Batch(concepts, segment_ids, step, index, first_lane, missing, origin, given)
