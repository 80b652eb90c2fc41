"""What is to be predicted: the targets of a dataset, batch by batch, with what predictors may look at."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcm_ds.config import DataConfig
from lcm_ds.data.batch import Batch
from lcm_ds.data.format import Dataset
from lcm_ds.data.loader import validation_batches
from lcm_ds.metrics import context_cosine
from lcm_ds.model.attention import SegmentLayout
from lcm_ds.model.normalizer import Normalizer

# Of a batch. What is in one depends on the dataset and the rows' length alone, and so does what contrastive accuracy
# compares.
ROWS = 16


@dataclass(frozen=True)
class Targets:
    """The targets of a batch, in order; fp32, normalised space but for what is said to be raw."""

    truth: Tensor  # [n, embed_dim]
    last: Tensor  # [n, embed_dim]: the concept before each
    before: Tensor  # [n, embed_dim]: the one before that in its segment; zeros, the centre, if there is none
    context: Tensor  # [n, embed_dim]: the mean of all concepts before it in its segment
    document: Tensor  # int64 [n], counted through the dataset
    position: Tensor  # int64 [n], in the document: so many concepts are before it there

    def __len__(self) -> int:
        return len(self.truth)


@dataclass(frozen=True)
class Rows:
    """A batch's rows on the device they are evaluated on."""

    concepts: Tensor  # fp32 [rows, row_length, embed_dim], raw space
    segment_ids: Tensor  # [rows, row_length]
    mask: Tensor  # bool [rows, row_length - 1]: entry t says whether concept t + 1 is a target
    targets: Targets

    @classmethod
    def of(cls, batch: Batch, normalizer: Normalizer, max_segment: int) -> Rows:
        """Those of a batch that has origins, on the normaliser's device."""
        assert batch.origins is not None
        device = normalizer.center.device
        concepts, ids = batch.concepts.to(device, torch.float32), batch.segment_ids.to(device)
        mask, origins = batch.target_mask.to(device), batch.origins.to(device)
        inputs = normalizer.normalize(concepts)
        layout = SegmentLayout.from_ids(batch.segment_ids, max_segment)
        starts, positions = layout.starts.to(device), layout.positions.to(device)
        # Running mean inside segments: the running sum, less what it was where the segment begins.
        sums = inputs.double().cumsum(1)
        until = torch.nn.functional.pad(sums, (0, 0, 1, 0))[:, :-1]
        at_start = until.gather(1, starts.unsqueeze(-1).expand_as(until))
        context = ((sums - at_start) / (positions + 1).unsqueeze(-1)).float()
        before = torch.nn.functional.pad(inputs, (0, 0, 1, 0))[:, :-1] * (positions > 0).unsqueeze(-1)
        document, position = origins[:, 1:][mask].unbind(-1)
        truth, last, before, context = (
            vectors[mask] for vectors in (inputs[:, 1:], inputs[:, :-1], before[:, :-1], context[:, :-1])
        )
        return cls(concepts, ids, mask, Targets(truth, last, before, context, document, position))

    def to_context(self, vectors: Tensor) -> Tensor:
        """The largest cosine of a vector to its target's context: [n] of [n, embed_dim], raw space."""
        placed = torch.zeros_like(self.concepts[:, 1:])
        placed[self.mask] = vectors
        return context_cosine(placed, self.concepts, self.segment_ids)[self.mask]


class Reader:
    """Reads datasets for rank `rank` of `size`, `batch_rows` rows at a time, and counts what it waits for them."""

    def __init__(self, data: DataConfig, rank: int = 0, size: int = 1, batch_rows: int = ROWS) -> None:
        self.data, self.rank, self.size, self.batch_rows = data, rank, size, batch_rows
        self.waited = 0.0  # seconds
        self.missing = 0  # concepts of rows, of shards that could not be read

    def batches(self, dataset: Dataset, rows: int | None = None, shared: bool = True) -> Iterator[Batch]:
        """This rank's share of a dataset, or of its first `rows` rows; all of them where it is not shared."""
        rank, size = (self.rank, self.size) if shared else (0, 1)
        length, longest = self.data.row_length, self.data.max_segment
        batches = validation_batches(dataset, length, longest, self.batch_rows, rank, size, rows, origins=True)
        while True:
            started = time.perf_counter()
            batch: Any = next(batches, None)
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def rows(self, dataset: Dataset, normalizer: Normalizer, rows: int | None = None) -> Iterator[tuple[Batch, Rows]]:
        """The same, ready to be predicted."""
        for batch in self.batches(dataset, rows):
            self.missing += batch.missing
            yield batch, Rows.of(batch, normalizer, self.data.max_segment)
