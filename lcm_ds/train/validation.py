"""Validation during training: the metrics of lcm_ds/metrics.py, the same for any number of ranks.

Most are means over all targets; those that compare targets with each other use the targets of the first rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lcm_ds import metrics
from lcm_ds.baselines.linear import RIDGES, Linear, TrainingSums, best_of, training_targets
from lcm_ds.baselines.targets import ROWS, Rows, TargetReader, Targets
from lcm_ds.data.format import Dataset
from lcm_ds.data.loader import Batch, validation_batches
from lcm_ds.distributed.collectives import from_first
from lcm_ds.model.attention import SegmentLayout
from lcm_ds.model.normalizer import Normalizer
from lcm_ds.train.step import Stepper

CPU = torch.device("cpu")

RIDGE_CONCEPTS = 100_000  # concepts of the training data, at most, that the ridge is fitted on
COMPARED_CONCEPTS = 2048  # concepts, in complete rows, whose targets are compared with each other


@torch.no_grad()
def fit_ridge(stepper: Stepper, on_progress: Callable[[], None]) -> Linear:
    """Fit the ridge regression that is best on held-out training documents, as `lcm-ds evaluate` does.

    A collective call with the same result on all ranks. on_progress: called after each batch.
    """
    job, env, device = stepper.job, stepper.env, stepper.device
    # No more rows at a time than a training step has, for which the device has memory.
    rows = min(ROWS, job.config.batch.micro_batch_rows)
    reader = TargetReader(job.config.data, env.rank, env.world_size, rows)
    normalizer: Normalizer = stepper.engine.module.normalizer

    def targets() -> Iterator[tuple[Targets, Tensor]]:
        for batch in training_targets(reader, job.datasets, job.config.data.train, normalizer, RIDGE_CONCEPTS):
            on_progress()
            yield batch

    def all_reduce(tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            dist.all_reduce(tensor)

    sums = TrainingSums.from_targets(targets(), job.model.embed_dim, device, all_reduce)
    best: Linear | None = None
    if env.rank == 0:
        # On the CPU, because the model fills the GPU's memory.
        ridges = TrainingSums(sums.fit.to(CPU), sums.held_out.to(CPU)).predictors(tuple(RIDGES))
        best = ridges[best_of(ridges)]
    best = from_first(best)
    assert best is not None
    return replace(best, weights=best.weights.to(device))


@torch.no_grad()
def validate(stepper: Stepper, dataset: Dataset, ridge: Linear, on_progress: Callable[[], None]) -> dict[str, Any]:
    """Compute the val_* metrics over a dataset, or over its first `evaluate.rows` rows; a collective call.

    Retrieval metrics rank the targets of the first rows only, while `lcm-ds evaluate` ranks all concepts.

    Args:
        stepper: with the model.
        dataset: to validate on.
        ridge: see `fit_ridge`.
        on_progress: called after each batch.

    Returns:
        The metrics by their keys, which `lcm_ds.metrics.LOGGED` defines. Without targets the losses are None, and
        the others are missing.
    """
    config, env = stepper.job.config, stepper.env
    stepper.engine.eval()
    sums, first_rows = _ValidationSums(stepper), _FirstRows(stepper)
    for batch in validation_batches(
        dataset,
        config.data.row_length,
        config.data.max_segment,
        config.batch.micro_batch_rows,
        env.rank,
        env.world_size,
        config.evaluate.rows,
        origins=True,
    ):
        predictions, _, mask = stepper.predict(stepper.prepare(batch))
        rows = Rows.from_batch(batch, stepper.engine.module.normalizer, config.data.max_segment)
        positions = SegmentLayout.from_ids(batch.segment_ids, config.data.max_segment).positions[:, 1:]
        sums.add(
            predictions[:, :-1][mask].float(), rows.targets, ridge(rows.targets), positions.to(stepper.device)[mask]
        )
        first_rows.add(batch, predictions, mask)
        on_progress()
    return {**sums.read(), **first_rows.read()}


class _ValidationSums:
    """Sums over all targets of this rank, and the metrics of all ranks' sums."""

    def __init__(self, stepper: Stepper) -> None:
        config, self.dims = stepper.job.config, stepper.job.model.embed_dim
        self.normalizer: Normalizer = stepper.engine.module.normalizer
        zeros = partial(torch.zeros, dtype=torch.float64, device=stepper.device)
        self.totals = zeros(6)  # squared error, cosine, ℓ2, squared errors of the copy and the ridge, targets
        self.moments = zeros(4, self.dims)  # of predictions and of targets: sums, and sums of squares
        longest = min(config.data.max_segment, config.data.row_length)
        self.by_position = zeros(2, longest)  # squared error, targets

    def add(self, predicted: Tensor, targets: Targets, of_ridge: Tensor, positions: Tensor) -> None:
        """Add targets.

        Args:
            predicted: by the model, [n, embed_dim], normalised space.
            targets: n targets.
            of_ridge: the ridge's predictions, [n, embed_dim], normalised space.
            positions: int64 [n], in the segment.
        """
        truth = targets.truth
        errors = metrics.squared_error(predicted, truth).double()
        self.totals[0] += errors.sum()
        raw = tuple(map(self.normalizer.denormalize, (predicted, truth)))
        self.totals[1] += metrics.cosine(*raw).sum()
        self.totals[2] += metrics.l2(*raw).sum()
        self.totals[3] += metrics.squared_error(targets.last, truth).sum()
        self.totals[4] += metrics.squared_error(of_ridge, truth).sum()
        self.totals[5] += len(truth)
        # In one order on GPUs, too, unlike index_add_.
        sums = torch.stack([errors, torch.ones_like(errors)], dim=1)
        self.by_position.T.index_put_((positions,), sums, accumulate=True)
        for index, values in enumerate((predicted, truth)):
            self.moments[2 * index] += values.sum(0)
            self.moments[2 * index + 1] += values.double().square().sum(0)

    def read(self) -> dict[str, Any]:
        """The metrics over all ranks; a collective call."""
        for sums in (self.totals, self.moments, self.by_position):
            dist.all_reduce(sums)
        count = self.totals[5]
        if not count:
            return {**dict.fromkeys(("val_loss", "val_loss_sum", "val_cosine", "val_l2")), "val_targets": 0}
        loss, cosine, l2, of_copy, of_ridge, _ = (self.totals / count).tolist()
        of_predictions, of_targets = metrics.variance(count.repeat(2), self.moments[::2], self.moments[1::2].sum(1))
        errors, counts = self.by_position[:, 1:].tolist()  # the first concept of a segment is not a target
        return {
            "val_loss": loss,
            "val_loss_sum": loss * self.dims,
            "val_cosine": cosine,
            "val_l2": l2,
            "val_loss_of_copy": of_copy,
            "val_loss_of_ridge": of_ridge,
            "val_loss_of_mean": of_targets.item() / self.dims,
            "val_variance_ratio": (of_predictions / of_targets).item(),
            "val_targets": int(count.item()),
            "val_error_by_position": [
                error / count if count else None for error, count in zip(errors, counts, strict=True)
            ],
        }


class _FirstRows:
    """The first rows of the validation data, in order, gathered from all ranks."""

    def __init__(self, stepper: Stepper) -> None:
        config, dims = stepper.job.config.data, stepper.job.model.embed_dim
        self.max_segment = config.max_segment
        self.normalizer: Normalizer = stepper.engine.module.normalizer
        rows = -(-COMPARED_CONCEPTS // config.row_length)
        # Each row belongs to one rank and is zero on the others, so the sum over ranks gathers the rows.
        self.concepts = torch.zeros(rows, config.row_length, dims, device=stepper.device)  # raw space
        self.predictions = torch.zeros_like(self.concepts)  # normalised space
        self.segment_ids = torch.zeros(rows, config.row_length, dtype=torch.int32, device=stepper.device)
        self.targets = torch.zeros_like(self.segment_ids)[:, 1:].contiguous()

    def add(self, batch: Batch, predictions: Tensor, mask: Tensor) -> None:
        """Keep the first rows.

        Args:
            batch: of this rank.
            predictions: [rows, row_length, embed_dim], normalised space.
            mask: of targets, bool [rows, row_length - 1].
        """
        count = min(len(mask), len(self.concepts) - batch.first_lane)
        if count > 0:
            part = slice(batch.first_lane, batch.first_lane + count)
            self.concepts[part] = batch.concepts[:count].to(self.concepts.device, torch.float32)
            self.segment_ids[part] = batch.segment_ids[:count].to(self.segment_ids.device)
            self.predictions[part], self.targets[part] = predictions[:count].float(), mask[:count].int()

    def read(self) -> dict[str, float | None]:
        """The metrics; none without targets. A collective call."""
        for rows in (self.concepts, self.predictions, self.segment_ids, self.targets):
            dist.all_reduce(rows)
        mask, ids = self.targets.bool(), self.segment_ids
        predicted, truth = self.predictions[:, :-1][mask], self.concepts[:, 1:][mask]
        if not len(truth):
            return {}
        normalised = {
            "val_effective_rank": predicted,
            "val_effective_rank_of_targets": self.normalizer.normalize(truth),
        }
        raw = self.normalizer.denormalize(self.predictions[:, :-1])
        predicted = raw[mask]
        segments = torch.arange(len(ids), device=ids.device).unsqueeze(1) * ids.shape[1] + ids
        positions = SegmentLayout.from_ids(ids.cpu(), self.max_segment).positions.to(ids.device)
        compared = metrics.others(truth, segments[:, 1:][mask], positions[:, 1:][mask])
        accuracy = metrics.contrastive_accuracy(predicted, truth, compared)
        predicted_cosine, truth_cosine = (
            metrics.context_cosine(vectors, self.concepts, ids)[mask] for vectors in (raw, self.concepts[:, 1:])
        )
        nearer = (metrics.compare(predicted, truth, truth) < 0).sum(1)
        return {
            "val_ca": _mean(accuracy),
            "val_par": _mean(metrics.paraphrasing(predicted_cosine, truth_cosine)),
            "val_batch_recall_at_1": metrics.recall_at(1, nearer).mean().item(),
            "val_batch_recall_at_10": metrics.recall_at(10, nearer).mean().item(),
            "val_batch_mrr": metrics.reciprocal_rank(nearer).mean().item(),
            **{
                key: metrics.effective_rank(torch.cov(vectors.double().T, correction=0))
                for key, vectors in normalised.items()
            },
        }


def _mean(values: Tensor) -> float | None:
    mean = values.nanmean()
    return None if mean.isnan() else mean.item()
