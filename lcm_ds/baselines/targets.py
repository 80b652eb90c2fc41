"""The targets of a dataset, batch by batch, with the inputs that predictors may use."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcm_ds.config import DataConfig
from lcm_ds.data.batch import Batch
from lcm_ds.data.format import Dataset
from lcm_ds.data.loader import validation_batches
from lcm_ds.metrics import context_cosine
from lcm_ds.model.attention import SegmentLayout
from lcm_ds.model.normalizer import Normalizer

# Rows per batch. A batch depends on the dataset and the row length only, and so does contrastive accuracy.
ROWS = 16


@dataclass(frozen=True)
class Targets:
    """The targets of a batch, in order; fp32, normalised space."""

    truth: Tensor  # [n, embed_dim]
    last: Tensor  # [n, embed_dim]: the concept before each target
    before: Tensor  # [n, embed_dim]: the concept before that in the segment; zeros (the centre) if there is none
    context: Tensor  # [n, embed_dim]: the mean of all concepts before the target in its segment
    document: Tensor  # int64 [n]: index of the document in the dataset
    position: Tensor  # int64 [n]: concepts before the target in its document

    def __len__(self) -> int:
        return len(self.truth)


@dataclass(frozen=True)
class Rows:
    """A batch's rows on the device they are evaluated on."""

    concepts: Tensor  # fp32 [rows, row_length, embed_dim], raw space
    segment_ids: Tensor  # [rows, row_length]
    mask: Tensor  # bool [rows, row_length - 1]: whether concept t + 1 is a target
    targets: Targets

    @classmethod
    def from_batch(cls, batch: Batch, normalizer: Normalizer, max_segment: int) -> Rows:
        """Take the rows of a batch with origins to the normaliser's device."""
        assert batch.origins is not None
        device = normalizer.center.device
        concepts, ids = batch.concepts.to(device, torch.float32), batch.segment_ids.to(device)
        mask, origins = batch.target_mask.to(device), batch.origins.to(device)
        inputs = normalizer.normalize(concepts)
        layout = SegmentLayout.from_ids(batch.segment_ids, max_segment)
        positions = layout.positions.to(device)
        context = running_mean(inputs, positions, layout.max_seqlen)
        before = F.pad(inputs, (0, 0, 1, 0))[:, :-1] * (positions > 0).unsqueeze(-1)
        document, position = origins[:, 1:][mask].unbind(-1)
        truth, last, before, context = (
            vectors[mask] for vectors in (inputs[:, 1:], inputs[:, :-1], before[:, :-1], context[:, :-1])
        )
        return cls(concepts, ids, mask, Targets(truth, last, before, context, document, position))

    def max_context_cosine(self, vectors: Tensor) -> Tensor:
        """The largest cosine of each vector, [n, embed_dim] in raw space, to its target's context: [n]."""
        full = torch.zeros_like(self.concepts[:, 1:])
        full[self.mask] = vectors
        return context_cosine(full, self.concepts, self.segment_ids)[self.mask]


def running_mean(vectors: Tensor, positions: Tensor, longest: int) -> Tensor:
    """The mean of each vector and those before it in its segment, by sums in fp64.

    torch.cumsum has no fixed order of additions on GPUs. Here the vectors that are summed double with each turn.

    Args:
        vectors: fp32 [rows, row_length, embed_dim].
        positions: int64 [rows, row_length], from 0 in every segment.
        longest: the length of a segment, at most.

    Returns:
        fp32 [rows, row_length, embed_dim].
    """
    sums, counts, summed = vectors.double(), (positions + 1).unsqueeze(-1), 1
    while summed < longest:
        sums[:, summed:] += torch.where(counts[:, summed:] > summed, sums[:, :-summed], 0.0)
        summed *= 2
    return (sums / counts).float()


class TargetReader:
    """Reads a rank's share of datasets in batches of `batch_rows` rows."""

    def __init__(self, data: DataConfig, rank: int = 0, size: int = 1, batch_rows: int = ROWS) -> None:
        self.data, self.rank, self.size, self.batch_rows = data, rank, size, batch_rows
        self.waited = 0.0  # seconds
        self.missing = 0  # concepts of unreadable shards in `rows`

    def batches(self, dataset: Dataset, rows: int | None = None, shared: bool = True) -> Iterator[Batch]:
        """The batches of a dataset.

        Args:
            dataset: to read.
            rows: only so many of its first rows; default: all.
            shared: only this rank's share.
        """
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
        """This rank's batches with their targets; see `batches`."""
        for batch in self.batches(dataset, rows):
            self.missing += batch.missing
            yield batch, Rows.from_batch(batch, normalizer, self.data.max_segment)
